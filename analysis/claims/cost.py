"""Claim 7: what a training pass costs with an adapter, against full fine-tuning."""

from __future__ import annotations

import math

import numpy as np

from analysis.claims.claim import Block, Finding
from analysis.claims.evidence import Evidence
from analysis.stats.effects import Estimate, Outcome, every, within

CLAIMED = 2 / 3
# As a share of the claimed ratio.
TOLERANCE = 0.1


def two_thirds_of_the_flops(e: Evidence) -> Finding | Block:
    """7: FLOPs of a forward and backward pass, from the parameters: (4N + 6a) / 6N for N of the
    model, a trained.

    LoRA's backward pass skips the gradients of the N frozen weights (2 of 6 FLOPs a parameter and
    token) and adds the adapter's own 6; attention's products, alike in both, are left out.
    Arithmetic: no chance is in it.
    """
    known = e.lora & np.isfinite(e.parameters)
    if not known.any() or not math.isfinite(e.model_parameters):
        return Block("no LoRA runs whose model's and adapter's parameters can be counted", "")
    sizes = {(int(r), float(a)) for r, a in zip(e.rank[known], e.parameters[known], strict=True)}
    ratios = {size: CLAIMED + size[1] / e.model_parameters for size in sizes}
    furthest = max(ratios, key=lambda size: abs(ratios[size] - CLAIMED))
    effects = [Estimate(ratio, 0.0, math.inf) for ratio in ratios.values()]
    low, high = CLAIMED * (1 - TOLERANCE), CLAIMED * (1 + TOLERANCE)
    judged = every([within(effect, low, high) for effect in effects])
    outcome = Outcome(judged.holds, judged.fails, "arithmetic on the counted parameters")
    shares = [
        size / e.model_parameters for (_, size), ratio in ratios.items() if low <= ratio <= high
    ]
    span = f"up to {max(shares):.1%} of the model's parameters" if shares else "of no size tried"
    reading = (
        f"A pass takes {min(ratios.values()):.2f} to {max(ratios.values()):.2f} of full "
        "fine-tuning's FLOPs. Adapters "
        f"{span} are within the margin; the one furthest from 2/3, of rank {furthest[0]}, has "
        f"{furthest[1] / e.model_parameters:.1%} of them and takes "
        f"{ratios[furthest]:.2f}.{_measured(e)}"
    )
    return Finding(
        Estimate(ratios[furthest], 0.0, math.inf),
        "of full fine-tuning's FLOPs",
        outcome,
        f"2/3 ± {TOLERANCE:.0%}",
        high,
        int(known.sum()),
        0,
        reading,
    )


def _measured(e: Evidence) -> str:
    """The measured time of the updates per token, which other costs than FLOPs enter; nothing where
    it is not known.
    """
    times = {
        arm: e.update_seconds[mask & np.isfinite(e.update_seconds)]
        for arm, mask in (("l", e.lora), ("f", e.full))
        if len(e.update_seconds)
    }
    if not times or not len(times["l"]) or not len(times["f"]):
        return ""
    return (
        f" Updates took {np.median(times['l']) / np.median(times['f']):.2f} of its time "
        "per token (median of runs)."
    )
