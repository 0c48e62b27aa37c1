"""Define a claim, what its test found, and the verdict that follows."""

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
# The best rate of a basin narrower than this many steps of the grid may lie between two rates.
RESOLVED = 2.0
# A claim that would take more seeds than this gets no advice on seeds.
MOST_SEEDS = 40


@dataclass(frozen=True, slots=True)
class JudgedClaim:
    """A claim judged for one set of runs.

    `effect` is in `unit`; `interval` is its 90% interval, as of two one-sided tests at 5%. `p` is
    the p-value of the null that the claim is false by the `margin`, `p_holm` the same corrected for
    all claims judged together; None without enough data. `settle` says what to run to settle it.
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
class Obstacle:
    """Why these runs cannot decide a claim, or one side of it, and what would change that."""

    why: str
    settle: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a claim's test.

    An undecided effect needs to move away from `bound`. `against_holds` and `against_fails` keep a
    verdict from being given whatever the test says.
    """

    effect: Estimate
    unit: str
    outcome: Outcome
    margin: str
    bound: float
    n: int
    seeds: int
    reading: str
    against_holds: Obstacle | None = None
    against_fails: Obstacle | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of LoRA Without Regret: its text, the recipe that tests it, and its test."""

    id: str
    text: str
    recipe: str
    judge: Callable[[Evidence], Finding | Obstacle]

    def verdict(self, evidence: Evidence | None) -> JudgedClaim:
        """Judge the claim; "cannot tell" without enough runs, or where the test is undecided."""
        result = Obstacle("there are no runs") if evidence is None else self.judge(evidence)
        if isinstance(result, Obstacle):
            return JudgedClaim(
                id=self.id,
                claim=self.text,
                verdict=UNKNOWN,
                effect=None,
                unit="",
                interval=None,
                n=0,
                test="none: not enough data",
                margin="",
                reading=f"Cannot tell: {result.why}.",
                settle=result.settle or self.command(),
            )
        holds, fails = result.outcome.holds <= ALPHA, result.outcome.fails <= ALPHA
        obstacle = result.against_holds if holds else result.against_fails if fails else None
        verdict = UNKNOWN if obstacle or not (holds or fails) else HOLDS if holds else FAILS
        if obstacle is not None:
            settle = obstacle.settle or self.command()
        elif verdict != UNKNOWN:
            settle = "settled for this model, task and margin"
        else:
            settle = self._more_seeds(evidence, result)
        return JudgedClaim(
            id=self.id,
            claim=self.text,
            verdict=verdict,
            effect=result.effect.value,
            unit=result.unit,
            interval=result.effect.interval(),
            n=result.n,
            test=result.outcome.test,
            margin=result.margin,
            reading=result.reading + (f" But {obstacle.why}." if obstacle else ""),
            settle=settle,
            p=result.outcome.holds,
        )

    def command(self, seeds: int = 3, source: str | None = None) -> str:
        """Return the command that runs the claim's recipe on some seeds."""
        recipe = source or f"recipes/lora_without_regret/{self.recipe}.yaml"
        return f"python -m harness.sweep {recipe} 'sweep.seeds={list(range(seeds))}'"

    def _more_seeds(self, evidence: Evidence | None, finding: Finding) -> str:
        sources = evidence.sources if evidence is not None else ()
        needed = seeds_needed(finding.effect, finding.bound, finding.seeds)
        if needed is None or needed > MOST_SEEDS:
            return f"the effect is so near the margin that it would take over {MOST_SEEDS} seeds"
        command = self.command(needed, sources[0] if len(sources) == 1 else None)
        return f"about {needed} seeds: {command}"


def with_holm(judged: list[JudgedClaim], adjusted: dict[str, float]) -> list[JudgedClaim]:
    """Add the corrected p-values by id; a "holds" that they do not support says so."""
    done = []
    for claim in judged:
        p = adjusted.get(claim.id)
        note = ""
        if claim.verdict == HOLDS and p is not None and p > ALPHA:
            note = (
                f" Corrected for {len(adjusted)} claims it is not significant (Holm p = {p:.2f})."
            )
        done.append(replace(claim, p_holm=p, reading=claim.reading + note))
    return done


def gap(first: Arm, second: Arm) -> Estimate | None:
    """Return the first arm's best score less the second's; None with too few seeds."""
    if first.peak is None or second.peak is None:
        return None
    return difference(first.peak, second.peak)


def kept(first: Arm, reference: Arm, share: float) -> Estimate:
    """Return the first arm's gain less a share of the reference's gain.

    It is one contrast, so that chance in the margin, a share of the reference's gain, counts too.
    """
    assert first.peak is not None
    assert reference.peak is not None
    less = combined([(1.0, first.peak), (-share, reference.peak)])
    return less.shifted((share - 1.0) * reference.floor)


def gained(arm: Arm) -> float:
    """Return what an arm gained over the base at its best rate, corrected for selection bias."""
    assert arm.peak is not None
    return arm.peak.value - arm.floor


def untuned(arm: Arm, who: str, *, coarse: bool = True) -> Obstacle | None:
    """Return that an arm may score higher than seen.

    Its best rate is the last tested or, with `coarse`, the grid is too wide for its basin.
    """
    rate = 10 ** arm.log_lr[arm.top]
    if arm.edge is not None:
        wider = rate * (3 if arm.edge == "highest" else 1 / 3)
        return Obstacle(
            f"{who}'s best rate, {rate_text(rate)}, is the {arm.edge} tested, so a better one may "
            "lie beyond",
            f"add learning rates from {rate_text(wider)} on for {who} to the sweep's space",
        )
    steps = arm.steps_across if coarse else None
    if steps is not None and steps < RESOLVED:
        low, high = (rate_text(10 ** arm.log_lr[arm.top + side]) for side in (-1, 1))
        return Obstacle(
            f"{who}'s basin is only {steps:.1f} steps of the tested rates wide, so its best may "
            "lie between two",
            f"add learning rates between {low} and {high} for {who} to the sweep's space",
        )
    return None


def not_learned(arm: Arm | None, who: str) -> Obstacle | None:
    """Return that an arm is missing, has too few seeds, or did not learn."""
    if arm is None:
        return Obstacle(f"there is no finished run of {who}")
    if arm.peak is None:
        return too_few_seeds(who)
    if not arm.learned:
        why = f"{who} did not rise above the base by more than chance"
        return Obstacle(why, "longer runs, or higher learning rates")
    return None


def too_few_seeds(who: str) -> Obstacle:
    """Return that an arm has too few seeds."""
    return Obstacle(f"{who} has fewer than two seeds at its good learning rates")


def points(value: float) -> str:
    """Write a difference of scores with its sign."""
    return f"{value:+.3f}" if math.isfinite(value) else "–"
