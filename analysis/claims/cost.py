"""Judge claim 7: what a training pass costs with an adapter, against full fine-tuning."""

from __future__ import annotations

import math

import numpy as np

from analysis.claims.claim import Finding, Obstacle
from analysis.claims.evidence import Evidence
from analysis.stats.effects import Estimate, Outcome, every, within

CLAIMED = 2 / 3
# The margin, as a share of the claimed ratio.
TOLERANCE = 0.1


def two_thirds_of_the_flops(e: Evidence) -> Finding | Obstacle:
    """7: FLOPs of a pass over full fine-tuning's: (4N + 6a) / 6N for N parameters, a trained.

    N counts the model's parameters, a the trained ones. LoRA's backward pass skips the gradients of
    the frozen weights (2 of 6 FLOPs a parameter and token) and adds the adapter's own 6. Attention
    products are alike in both and left out. This is arithmetic, without chance.
    """
    known = e.lora & np.isfinite(e.parameters)
    if not known.any() or not math.isfinite(e.model_parameters):
        return Obstacle("the parameters of no model and adapter can be counted")
    sizes = {(int(r), float(a)) for r, a in zip(e.rank[known], e.parameters[known], strict=True)}
    ratios = {size: CLAIMED + size[1] / e.model_parameters for size in sizes}
    furthest = max(ratios, key=lambda size: abs(ratios[size] - CLAIMED))
    low, high = CLAIMED * (1 - TOLERANCE), CLAIMED * (1 + TOLERANCE)
    judged = every([within(Estimate(ratio, 0.0, math.inf), low, high) for ratio in ratios.values()])
    inside = [size for (_, size), ratio in ratios.items() if low <= ratio <= high]
    largest = "No adapter is within the margin"
    if inside:
        share = max(inside) / e.model_parameters
        largest = f"Adapters up to {share:.1%} of the model's parameters are within the margin"
    reading = (
        f"A pass takes {min(ratios.values()):.2f} to {max(ratios.values()):.2f} of full "
        f"fine-tuning's FLOPs. {largest}. The adapter furthest from 2/3, of rank {furthest[0]}, "
        f"has {furthest[1] / e.model_parameters:.1%} of them and takes {ratios[furthest]:.2f}."
    )
    if len(e.update_seconds):
        lora, full = (
            e.update_seconds[mask & np.isfinite(e.update_seconds)] for mask in (e.lora, e.full)
        )
        if len(lora) and len(full):
            reading += (
                f" Measured, updates took {np.median(lora) / np.median(full):.2f} of its time per "
                "token (median of runs)."
            )
    return Finding(
        effect=Estimate(ratios[furthest], 0.0, math.inf),
        unit="of full fine-tuning's FLOPs",
        outcome=Outcome(judged.holds, judged.fails, "arithmetic on the counted parameters"),
        margin=f"2/3 ± {TOLERANCE:.0%}",
        bound=high,
        n=int(known.sum()),
        seeds=0,
        reading=reading,
    )
