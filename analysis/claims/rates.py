"""Judge the claims about the best learning rate: by rank and alpha, against full fine-tuning's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from analysis.claims.arm import Arm, centre, pooled_centre_noise
from analysis.claims.claim import Finding, Obstacle, not_learned
from analysis.claims.evidence import Evidence, Mask
from analysis.data.labels import lr as rate_text
from analysis.stats.effects import Estimate, better, beyond, combined, difference, within

# Two rates within this factor of each other are about the same.
FACTOR = 2.0
# The best LoRA rate over the best full fine-tuning rate.
LORA_OVER_FULL = 10.0
# Half way between no dependence on rank (exponent 0) and muA's r^-1/2 for a fixed multiplier
# (2602.06204).
HALF_WAY = 0.25
# The claim that the best rate does not depend on rank is about ranks from here on.
FROM_RANK = 4
# Exponents are fitted over at least this many octaves of rank.
MIN_OCTAVES = 3.0
# A rate less than this factor lower is no lower.
LOWER = 1.25
RULE_ALPHA = 32.0
Key = TypeVar("Key", int, float)


@dataclass(frozen=True, slots=True)
class BestRates:
    """The best rate's log10 per rank, the arms behind it, and the variance of one seed's."""

    best: dict[int, Estimate]
    arms: dict[int, Arm]
    noise: float

    @classmethod
    def of(cls, arms: dict[int, Arm]) -> BestRates:
        """Return the best rates of the arms whose basin is located."""
        best, noise = located(arms)
        return cls(best, arms, noise)

    def together(self, ranks: Sequence[int]) -> Estimate:
        """Return the best rate's log10 over several ranks."""
        basins = [basin for rank in ranks if (basin := self.arms[rank].basin) is not None]
        return centre(basins, self.noise)

    @property
    def runs(self) -> int:
        """The number of runs behind the rates."""
        return sum(arm.runs for arm in self.arms.values())

    @property
    def seeds(self) -> int:
        """The fewest seeds of an arm."""
        return min(arm.seeds for arm in self.arms.values())

    def path(self) -> str:
        """Say how the rate goes from the lowest to the highest rank."""
        first, last = min(self.best), max(self.best)
        low, high = (rate_text(10 ** self.best[rank].value) for rank in (first, last))
        return f"goes from {low} at rank {first} to {high} at rank {last}"


def located(arms: Mapping[Key, Arm]) -> tuple[dict[Key, Estimate], float]:
    """Return the best rate's log10 of the arms whose basin is located, and one seed's variance."""
    basins = {key: basin for key, arm in arms.items() if (basin := arm.basin) is not None}
    noise = pooled_centre_noise(list(basins.values())) if basins else math.nan
    return {key: centre([basin], noise) for key, basin in basins.items()}, noise


def hardly_depends_on_rank(e: Evidence) -> Finding | Obstacle:
    """2a: equivalence to 0 of rank's exponent in the best rate, alpha fixed, from rank 4 on."""
    rates = _over_ranks(e, "alpha")
    if isinstance(rates, Obstacle):
        return rates
    slope, octaves = exponent(rates.best)
    bound = min(HALF_WAY, math.log2(FACTOR) / octaves)
    return Finding(
        effect=slope,
        unit="exponent of rank",
        outcome=within(slope, -bound, bound),
        margin=f"±{bound:.2f} (less than {2 ** (bound * octaves):.1f}x over these ranks)",
        bound=math.copysign(bound, slope.value),
        n=rates.runs,
        seeds=rates.seeds,
        reading=f"The best rate {rates.path()}: as rank to the power {slope.value:+.2f}.",
    )


def lower_at_rank_one(e: Evidence) -> Finding | Obstacle:
    """2b: whether rank 1's best rate is below that of ranks from 4 on."""
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "alpha"):
        ranks = [rank for rank in e.ranks(stratum) if rank == 1 or rank >= FROM_RANK]
        if ranks[:1] != [1] or len(ranks) < 2:
            continue
        rates = _best_rates(e, stratum, ranks)
        if isinstance(rates, Obstacle):
            return rates
        others = rates.together([rank for rank in rates.best if rank != 1])
        effect = difference(others, rates.best[1])
        return Finding(
            effect=effect,
            unit="decades below higher ranks'",
            outcome=better(effect, effect.scaled(-1.0).shifted(math.log10(LOWER))),
            margin=f"a factor of {LOWER}",
            bound=0.0,
            n=rates.runs,
            seeds=rates.seeds,
            reading=(
                f"Rank 1's best rate is {rate_text(10 ** rates.best[1].value)}, higher ranks' "
                f"{rate_text(10**others.value)}: {10**effect.value:.2f} times."
            ),
        )
    return Obstacle(f"there are no runs of rank 1 beside ranks from {FROM_RANK} on")


def alpha_with_rank_is_not_invariant(e: Evidence) -> Finding | Obstacle:
    """2c: whether the best rate falls with rank at a fixed alpha/rank, as muA says."""
    rates = _over_ranks(e, "scale")
    if isinstance(rates, Obstacle):
        return rates
    slope, _ = exponent(rates.best)
    return Finding(
        effect=slope,
        unit="exponent of rank",
        outcome=beyond(slope, -HALF_WAY),
        margin=f"−{HALF_WAY} (half way from 0 to −1/2)",
        bound=-HALF_WAY,
        n=rates.runs,
        seeds=rates.seeds,
        reading=(
            f"With alpha in proportion to rank the best rate {rates.path()}: as rank to the power "
            f"{slope.value:+.2f}. muA predicts −0.5, invariance would be 0."
        ),
    )


def ten_times_full(e: Evidence) -> Finding | Obstacle:
    """3: equivalence of LoRA's best rate over full fine-tuning's to 10."""
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "alpha"):
        full = e.arm(e.full_like(stratum))
        if full is None:
            continue
        rates = _best_rates(e, stratum, usual_ranks(e, stratum))
        if isinstance(rates, Obstacle):
            return rates
        if (obstacle := unlocated(full, "full fine-tuning")) is not None:
            return obstacle
        assert full.basin is not None
        lora = rates.together(list(rates.best))
        best_full = centre([full.basin], pooled_centre_noise([full.basin]))
        effect = difference(lora, best_full)
        claimed, factor = math.log10(LORA_OVER_FULL), math.log10(FACTOR)
        return Finding(
            effect=effect,
            unit="decades above full fine-tuning's",
            outcome=within(effect, claimed - factor, claimed + factor),
            margin=f"{LORA_OVER_FULL / FACTOR:g}x to {LORA_OVER_FULL * FACTOR:g}x",
            bound=claimed + math.copysign(factor, effect.value - claimed),
            n=rates.runs + full.runs,
            seeds=min(rates.seeds, full.seeds),
            reading=(
                f"The best rate is {rate_text(10**lora.value)} for LoRA and "
                f"{rate_text(10**best_full.value)} for full fine-tuning: "
                f"{10**effect.value:.1f} times."
            ),
        )
    return Obstacle(
        "there are no runs of both LoRA and full fine-tuning at the same batch size and length"
    )


def rule_is_right(e: Evidence) -> Finding | Obstacle:
    """9: equivalence of LoRA's best rate, at alpha 32, to the rule's for this model."""
    if not math.isfinite(e.rule_lr):
        return Obstacle("the rule is for Llama and Qwen models whose config.json can be read")
    for stratum in e.strata(e.lora & (e.alpha == RULE_ALPHA), "batch", "budget", "targets"):
        rates = _best_rates(e, stratum, usual_ranks(e, stratum))
        if isinstance(rates, Obstacle):
            return rates
        lora = rates.together(list(rates.best))
        effect = lora.shifted(-math.log10(e.rule_lr))
        factor = math.log10(FACTOR)
        return Finding(
            effect=effect,
            unit="decades above the rule's",
            outcome=within(effect, -factor, factor),
            margin=f"a factor of {FACTOR:g}",
            bound=math.copysign(factor, effect.value),
            n=rates.runs,
            seeds=rates.seeds,
            reading=(
                f"The rule says {rate_text(e.rule_lr)}, the best rate is "
                f"{rate_text(10**lora.value)}: {10**effect.value:.2f} times."
            ),
        )
    return Obstacle(f"there are no LoRA runs at alpha {RULE_ALPHA:g}, which the rule is for")


def usual_ranks(e: Evidence, stratum: Mask) -> list[int]:
    """Return the ranks whose best rate is called LoRA's: those from 4 on, else all."""
    ranks = e.ranks(stratum)
    return [rank for rank in ranks if rank >= FROM_RANK] or ranks


def _over_ranks(e: Evidence, fixed: Literal["alpha", "scale"]) -> BestRates | Obstacle:
    """Return the best rates over ranks from 4 on, where they span enough, with `fixed` equal."""
    for stratum in e.strata(e.lora, "batch", "budget", "targets", fixed):
        ranks = [rank for rank in e.ranks(stratum) if rank >= FROM_RANK]
        if ranks and math.log2(ranks[-1] / ranks[0]) >= MIN_OCTAVES:
            return _best_rates(e, stratum, ranks)
    what = "alpha" if fixed == "alpha" else "alpha/rank"
    return Obstacle(
        f"no runs with the same {what} have ranks from {FROM_RANK} on that span a factor of "
        f"{2**MIN_OCTAVES:g}"
    )


def _best_rates(e: Evidence, stratum: Mask, ranks: list[int]) -> BestRates | Obstacle:
    """Return the best rate of each rank, or why one cannot be located."""
    arms = e.arms(stratum, ranks)
    for rank in ranks:
        obstacle = unlocated(arms.get(rank), f"rank {rank}")
        if obstacle is not None:
            return obstacle
    return BestRates.of(arms)


def unlocated(arm: Arm | None, who: str) -> Obstacle | None:
    """Return why an arm's best rate is not known, and what would tell; None where it is."""
    obstacle = not_learned(arm, who)
    if arm is None or obstacle is not None or arm.basin is not None:
        return obstacle
    if arm.seeds < 2:
        return Obstacle(f"{who} has one seed")
    left, right, _, _ = arm.ends
    sides = (("below", left, arm.log_lr[0]), ("above", right, arm.log_lr[-1]))
    open_sides = [
        f"{side} {rate_text(10**last)}" for side, end, last in sides if not np.isfinite(end).all()
    ]
    return Obstacle(
        f"{who} is still good at the end of the tested rates, so its best may lie further",
        f"add learning rates {' and '.join(open_sides)} for {who} to the sweep's space",
    )


def exponent(best: Mapping[Key, Estimate]) -> tuple[Estimate, float]:
    """Fit the exponent of rank (or alpha) in the best rate by least squares.

    Also return over how many octaves of it.
    """
    ranks = sorted(best)
    x = np.log2(ranks)
    weights = math.log2(10) * (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = combined([(float(w), best[rank]) for w, rank in zip(weights, ranks, strict=True)])
    return slope, float(x[-1] - x[0])
