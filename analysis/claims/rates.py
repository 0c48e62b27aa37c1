"""Claims about the best learning rate: how it goes with rank, with alpha, against full
fine-tuning's and a rule's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from analysis.claims.arm import Arm, centre, pooled_centre_noise
from analysis.claims.claim import Block, Finding, not_learned
from analysis.claims.evidence import Evidence, Mask
from analysis.data.labels import lr as rate_text
from analysis.stats.effects import Estimate, better, beyond, combined, difference, within

# Two rates within this factor of each other are about the same.
FACTOR = 2.0
# Best LoRA rate over best full fine-tuning rate.
LORA_OVER_FULL = 10.0
# Half way between no dependence on rank (exponent 0) and muA's r^-1/2 for a fixed multiplier
# (2602.06204).
HALF_WAY = 0.25
# From this rank on the best rate is said not to depend on rank.
FROM_RANK = 4
# A slope over fewer octaves of rank tells nothing.
MIN_OCTAVES = 3.0
# A rate less than this lower, as a factor, is no lower.
LOWER = 1.25
RULE_ALPHA = 32.0
Key = TypeVar("Key", int, float)


@dataclass(frozen=True, slots=True)
class Rates:
    """The best rate's log10 per rank, the arms they come from, and the variance of one seed's over
    them.
    """

    best: dict[int, Estimate]
    arms: dict[int, Arm]
    noise: float

    @classmethod
    def of(cls, arms: dict[int, Arm]) -> Rates:
        """The best rates of those of some arms, by rank, whose basin is located."""
        best, noise = located(arms)
        return cls(best, arms, noise)

    def together(self, ranks: Sequence[int]) -> Estimate:
        """The best rate's log10 over several ranks."""
        return centre(
            [basin for rank in ranks if (basin := self.arms[rank].basin) is not None], self.noise
        )

    @property
    def runs(self) -> int:
        """How many runs stand behind them."""
        return sum(arm.runs for arm in self.arms.values())

    @property
    def seeds(self) -> int:
        """The fewest seeds of an arm."""
        return min(arm.seeds for arm in self.arms.values())

    def at(self, rank: int) -> str:
        """A rank's best rate in words."""
        return rate_text(10 ** self.best[rank].value)


def located(arms: Mapping[Key, Arm]) -> tuple[dict[Key, Estimate], float]:
    """The best rate's log10 of those arms whose basin is located, and the variance of one seed's,
    pooled over them.
    """
    basins = {key: basin for key, arm in arms.items() if (basin := arm.basin) is not None}
    noise = pooled_centre_noise(list(basins.values())) if basins else math.nan
    return {key: centre([basin], noise) for key, basin in basins.items()}, noise


def hardly_depends_on_rank(e: Evidence) -> Finding | Block:
    """2a: equivalence to 0 of the exponent of rank in the best rate, with alpha fixed, from rank 4
    on.
    """
    found = _over_ranks(e, "alpha")
    if isinstance(found, Block):
        return found
    slope, octaves = exponent(found.best)
    bound = min(HALF_WAY, math.log2(FACTOR) / octaves)
    low, high = min(found.best), max(found.best)
    reading = (
        f"The best rate goes from {found.at(low)} at rank {low} to {found.at(high)} at "
        f"rank {high}: as rank to the "
        f"power {slope.value:+.2f}."
    )
    margin = f"±{bound:.2f} (less than {2 ** (bound * octaves):.1f}x over these ranks)"
    return Finding(
        slope,
        "exponent of rank",
        within(slope, -bound, bound),
        margin,
        math.copysign(bound, slope.value),
        found.runs,
        found.seeds,
        reading,
    )


def lower_at_rank_one(e: Evidence) -> Finding | Block:
    """2b: whether rank 1's best rate is below that of ranks from 4 on."""
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "alpha"):
        ranks = [rank for rank in e.ranks(stratum) if rank == 1 or rank >= FROM_RANK]
        if ranks[:1] == [1] and len(ranks) > 1:
            found = _located(e, stratum, ranks)
            if isinstance(found, Block):
                return found
            others = found.together([rank for rank in found.best if rank != 1])
            effect = difference(others, found.best[1])
            reading = (
                f"Rank 1's best rate is {found.at(1)}, higher ranks' "
                f"{rate_text(10**others.value)}: "
                f"{10**effect.value:.2f} times."
            )
            outcome = better(effect, effect.scaled(-1.0).shifted(math.log10(LOWER)))
            return Finding(
                effect,
                "decades below higher ranks'",
                outcome,
                f"a factor of {LOWER}",
                0.0,
                found.runs,
                found.seeds,
                reading,
            )
    return Block(f"no runs of rank 1 beside ranks from {FROM_RANK} on", "")


def alpha_with_rank_is_not_invariant(e: Evidence) -> Finding | Block:
    """2c: whether with alpha = 2r (or another fixed alpha/r) the best rate falls with rank, as muA
    says.
    """
    found = _over_ranks(e, "scale")
    if isinstance(found, Block):
        return found
    slope, _ = exponent(found.best)
    low, high = min(found.best), max(found.best)
    reading = (
        f"With alpha in proportion to rank the best rate goes from {found.at(low)} at rank "
        f"{low} to {found.at(high)} "
        f"at rank {high}: as rank to the power {slope.value:+.2f}, against −0.5 by muA and "
        "0 for invariance."
    )
    return Finding(
        slope,
        "exponent of rank",
        beyond(slope, -HALF_WAY),
        f"−{HALF_WAY} (half way from 0 to −1/2)",
        -HALF_WAY,
        found.runs,
        found.seeds,
        reading,
    )


def ten_times_full(e: Evidence) -> Finding | Block:
    """3: equivalence of LoRA's best rate over full fine-tuning's to 10."""
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "alpha"):
        full = e.arm(e.full_like(stratum))
        if full is None:
            continue
        found = _located(e, stratum, usual_ranks(e, stratum))
        if isinstance(found, Block):
            return found
        block = unlocated(full, "full fine-tuning")
        if block is not None:
            return block
        assert full.basin is not None
        lora = found.together(list(found.best))
        best_full = centre([full.basin], pooled_centre_noise([full.basin]))
        effect = difference(lora, best_full)
        wanted, factor = math.log10(LORA_OVER_FULL), math.log10(FACTOR)
        reading = (
            f"The best rate is {rate_text(10**lora.value)} for LoRA and "
            f"{rate_text(10**best_full.value)} for full "
            f"fine-tuning: {10**effect.value:.1f} times."
        )
        return Finding(
            effect,
            "decades above full fine-tuning's",
            within(effect, wanted - factor, wanted + factor),
            f"{LORA_OVER_FULL / FACTOR:g}x to {LORA_OVER_FULL * FACTOR:g}x",
            wanted + math.copysign(factor, effect.value - wanted),
            found.runs + full.runs,
            min(found.seeds, full.seeds),
            reading,
        )
    return Block("no runs of both LoRA and full fine-tuning at the same batch size and length", "")


def rule_is_right(e: Evidence) -> Finding | Block:
    """9: equivalence of LoRA's best rate, at alpha 32, to the rule's for this model."""
    if not math.isfinite(e.rule_lr):
        return Block("the rule is for Llama and Qwen models whose config.json can be read", "")
    usual = e.lora & (e.alpha == RULE_ALPHA)
    for stratum in e.strata(usual, "batch", "budget", "targets"):
        found = _located(e, stratum, usual_ranks(e, stratum))
        if isinstance(found, Block):
            return found
        lora = found.together(list(found.best))
        effect = lora.shifted(-math.log10(e.rule_lr))
        factor = math.log10(FACTOR)
        reading = (
            f"The rule says {rate_text(e.rule_lr)}, the best rate is {rate_text(10**lora.value)}: "
            f"{10**effect.value:.2f} times."
        )
        outcome = within(effect, -factor, factor)
        return Finding(
            effect,
            "decades above the rule's",
            outcome,
            f"a factor of {FACTOR:g}",
            math.copysign(factor, effect.value),
            found.runs,
            found.seeds,
            reading,
        )
    return Block(f"no LoRA runs at alpha {RULE_ALPHA:g}, for which the rule is", "")


def usual_ranks(e: Evidence, stratum: Mask) -> list[int]:
    """The ranks from 4 on among some runs, or all where there is none: those whose best rate is
    called LoRA's.
    """
    ranks = e.ranks(stratum)
    return [rank for rank in ranks if rank >= FROM_RANK] or ranks


def _over_ranks(e: Evidence, fixed: Literal["alpha", "scale"]) -> Rates | Block:
    """The best rates over ranks from 4 on, with alpha or alpha/r fixed, where they span enough."""
    for stratum in e.strata(e.lora, "batch", "budget", "targets", fixed):
        ranks = [rank for rank in e.ranks(stratum) if rank >= FROM_RANK]
        if ranks and math.log2(ranks[-1] / ranks[0]) >= MIN_OCTAVES:
            return _located(e, stratum, ranks)
    what = "alpha" if fixed == "alpha" else "alpha/rank"
    return Block(
        f"no runs at ranks from {FROM_RANK} on that span a factor of {2**MIN_OCTAVES:g}, "
        f"with the same {what}",
        "",
    )


def _located(e: Evidence, stratum: Mask, ranks: list[int]) -> Rates | Block:
    """The best rate of each rank; a Block naming the first rank whose basin cannot be located."""
    arms = e.arms(stratum, ranks)
    for rank in ranks:
        block = unlocated(arms.get(rank), f"rank {rank}")
        if block is not None:
            return block
    return Rates.of(arms)


def unlocated(arm: Arm | None, who: str) -> Block | None:
    """Why an arm's best rate is not known, and what would tell; None where it is."""
    block = not_learned(arm, who)
    if arm is None or block is not None or arm.basin is not None:
        return block
    if arm.seeds < 2:
        return Block(f"{who} has one seed", "")
    left, right, _, _ = arm.ends
    open_sides = [
        name for name, end in (("below", left), ("above", right)) if not np.isfinite(end).all()
    ]
    ends = {"below": rate_text(10 ** arm.log_lr[0]), "above": rate_text(10 ** arm.log_lr[-1])}
    sides = " and ".join(f"{side} {ends[side]}" for side in open_sides)
    return Block(
        f"{who} is still good at the end of the tested rates, so its best may lie further",
        f"add learning rates {sides} for {who} to the sweep's space",
    )


def exponent(best: Mapping[Key, Estimate]) -> tuple[Estimate, float]:
    """The exponent of rank (or alpha) in the best rate, by least squares, and the octaves of it
    that it is over.
    """
    ranks = sorted(best)
    x = np.log2(ranks)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    to_octaves = math.log2(10)
    slope = combined(
        [(float(w) * to_octaves, best[rank]) for w, rank in zip(weights, ranks, strict=True)]
    )
    return slope, float(x[-1] - x[0])
