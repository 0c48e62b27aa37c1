"""A claim, what judging it finds, and the verdict that follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from analysis.claims.arm import Arm
from analysis.claims.evidence import Evidence
from analysis.data.labels import lr as rate_text
from analysis.stats.effects import ALPHA, Estimate, Outcome, combined, difference, seeds_needed

HOLDS: Literal["holds"] = "holds"
FAILS: Literal["does not hold"] = "does not hold"
UNKNOWN: Literal["cannot tell"] = "cannot tell"
# A difference below this share of what training gained is no difference: the line that a good
# learning rate keeps too.
GAIN_SHARE = 0.1
# A basin fewer steps of the grid wide may have its top between two tested rates.
RESOLVED = 2.0
# More seeds than this are no advice.
MOST_SEEDS = 40


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim judged for one set of runs: `effect` in `unit` with its 90% `interval` (the two
    one-sided tests' at 5%).

    `p` is the chance of such evidence for the claim where it is false by the `margin`, `p_holm` the
    same adjusted for all claims judged together; None without enough data. `settle` says what to
    run to settle it.
    """

    id: str
    claim: str
    verdict: Literal["holds", "does not hold", "cannot tell"]
    effect: float | None
    unit: str
    interval: tuple[float, float] | None
    n: int
    test: str
    margin: str
    reading: str
    settle: str
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Why a side cannot be decided by these runs, whatever the test says, and what would
    lift that.
    """

    why: str
    settle: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What a claim's test found. `bound` is where the undecided effect must get away from."""

    effect: Estimate
    unit: str
    outcome: Outcome
    margin: str
    bound: float
    n: int
    seeds: int
    reading: str
    against_holds: Block | None = None
    against_fails: Block | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of LoRA Without Regret: its statement, the recipe that tests it, and the function
    that judges it.
    """

    id: str
    text: str
    recipe: str
    judge: Callable[[Evidence], Finding | Block]

    def verdict(self, evidence: Evidence | None) -> Verdict:
        """The claim judged; "cannot tell" without runs, without enough of them, or where the
        interval straddles.
        """
        found = (
            Block("there are no runs", self.command()) if evidence is None else self.judge(evidence)
        )
        if isinstance(found, Block):
            settle = found.settle or self.command()
            return Verdict(
                self.id,
                self.text,
                UNKNOWN,
                None,
                "",
                None,
                0,
                "none: not enough data",
                "",
                f"Cannot tell: {found.why}.",
                settle,
            )
        holds, fails = found.outcome.holds <= ALPHA, found.outcome.fails <= ALPHA
        block = found.against_holds if holds else found.against_fails if fails else None
        kind = UNKNOWN if block or not (holds or fails) else HOLDS if holds else FAILS
        reading = found.reading if block is None else f"{found.reading} But {block.why}."
        return Verdict(
            self.id,
            self.text,
            kind,
            found.effect.value,
            found.unit,
            found.effect.interval(),
            found.n,
            found.outcome.test,
            found.margin,
            reading,
            self._settle(evidence, found, kind, block),
            found.outcome.holds,
        )

    def command(self, seeds: int = 3, source: str | None = None) -> str:
        """The command that runs what this claim needs on so many seeds."""
        recipe = source or f"recipes/lora_without_regret/{self.recipe}.yaml"
        return f"python -m harness.sweep {recipe} 'sweep.seeds={list(range(seeds))}'"

    def _settle(
        self, evidence: Evidence | None, found: Finding, kind: str, block: Block | None
    ) -> str:
        if block is not None:
            return block.settle or self.command()
        if kind != UNKNOWN:
            return "settled for this model, task and margin"
        source = (
            evidence.sources[0] if evidence is not None and len(evidence.sources) == 1 else None
        )
        wanted = seeds_needed(found.effect, found.bound, found.seeds)
        if wanted is None or wanted > MOST_SEEDS:
            return (
                f"the effect is so near the margin that more than {MOST_SEEDS} seeds "
                "would be needed to tell"
            )
        return f"about {wanted} seeds: {self.command(wanted, source)}"


def with_holm(verdicts: list[Verdict], adjusted: dict[str, float]) -> list[Verdict]:
    """Verdicts with their adjusted p-values by id; a "holds" that these do not bear out says so."""
    done = []
    for verdict in verdicts:
        p = adjusted.get(verdict.id)
        doubt = verdict.verdict == HOLDS and p is not None and p > ALPHA
        note = (
            f" Among {len(adjusted)} claims judged together it would not be sure (Holm p = "
            f"{p:.2f})."
            if doubt
            else ""
        )
        done.append(replace(verdict, p_holm=p, reading=verdict.reading + note))
    return done


def gap(first: Arm, second: Arm) -> Estimate | None:
    """The first arm's best score less the second's, both free of the choice; None with too few
    seeds.
    """
    if first.peak is None or second.peak is None:
        return None
    return difference(first.peak, second.peak)


def kept(first: Arm, reference: Arm, share: float) -> Estimate:
    """The first arm's gain less a share of the reference's: above 0 where it keeps that share.

    One contrast, so that chance in the margin, a share of the reference's gain, counts too.
    """
    assert first.peak is not None
    assert reference.peak is not None
    return combined([(1.0, first.peak), (-share, reference.peak)]).shifted(
        (share - 1.0) * reference.floor
    )


def gained(arm: Arm) -> float:
    """What an arm gained over the base at its best rate, free of the choice."""
    assert arm.peak is not None
    return arm.peak.value - arm.floor


def untuned(arm: Arm, who: str, *, coarse: bool = True) -> Block | None:
    """That an arm may do better than seen: its best rate is the last tested or (`coarse`) the grid
    too wide for it.
    """
    rate = 10 ** arm.log_lr[arm.top]
    if arm.edge is not None:
        wider = rate * (3 if arm.edge == "highest" else 1 / 3)
        return Block(
            f"{who}'s best rate, {rate_text(rate)}, is the {arm.edge} tested, so it may do "
            "better beyond",
            f"add learning rates from {rate_text(wider)} on for {who} to the sweep's space",
        )
    steps = arm.steps_across if coarse else None
    if steps is not None and steps < RESOLVED:
        low, high = (rate_text(10 ** arm.log_lr[arm.top + side]) for side in (-1, 1))
        return Block(
            f"{who}'s basin is only {steps:.1f} steps of the tested rates wide: its best "
            "may lie between",
            f"add learning rates between {low} and {high} for {who} to the sweep's space",
        )
    return None


def not_learned(arm: Arm | None, who: str) -> Block | None:
    """That an arm is missing, has too few seeds, or did not learn: there is nothing to compare
    with.
    """
    if arm is None:
        return Block(f"no finished run of {who}", "")
    if arm.peak is None:
        return Block(f"{who} has fewer than two seeds at its good learning rates", "")
    if not arm.learned:
        return Block(
            f"{who} did not rise above the base by more than chance",
            "longer runs, or higher learning rates",
        )
    return None


def points(value: float) -> str:
    """A difference of scores, signed."""
    return f"{value:+.3f}" if math.isfinite(value) else "–"
