"""Tests of an estimated effect against a stated margin: better, no worse, equivalent; and several
at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_ind, ttost_paired

ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True, slots=True)
class Estimate:
    """An effect, its standard error and degrees of freedom; infinite ones and no error: arithmetic,
    without chance.

    No error with finite ones is too few seeds to have differed: that excludes nothing.
    """

    value: float
    se: float
    df: float

    def above(self, bound: float) -> float:
        """One-sided p of the null that the effect is at most `bound` (Student's t)."""
        if self.se == 0:
            return float(self.value <= bound) if math.isinf(self.df) else 1.0
        return float(special.stdtr(self.df, (bound - self.value) / self.se))

    def below(self, bound: float) -> float:
        """One-sided p of the null that the effect is at least `bound`."""
        if self.se == 0:
            return float(self.value >= bound) if math.isinf(self.df) else 1.0
        return float(special.stdtr(self.df, (self.value - bound) / self.se))

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The 1 - 2 alpha interval: its ends are what the two one-sided tests at `alpha` can
        exclude.
        """
        reach = self.se * float(special.stdtrit(self.df, 1 - alpha)) if self.se else 0.0
        return self.value - reach, self.value + reach

    def scaled(self, factor: float) -> Estimate:
        """The effect in another unit."""
        return Estimate(self.value * factor, self.se * abs(factor), self.df)

    def shifted(self, by: float) -> Estimate:
        """The effect counted from another origin."""
        return Estimate(self.value + by, self.se, self.df)


def combined(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """A weighted sum of independent estimates, with Welch and Satterthwaite's degrees of freedom
    (Welch 1947).
    """
    value = sum(weight * part.value for weight, part in parts)
    variances = [(weight * part.se) ** 2 for weight, part in parts]
    total = sum(variances)
    spread = sum(v * v / part.df for v, (_, part) in zip(variances, parts, strict=True) if v)
    df = total * total / spread if spread else min(part.df for _, part in parts)
    return Estimate(value, math.sqrt(total), df)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """The first less the second, independent of each other (Welch 1947)."""
    return combined([(1.0, first), (-1.0, second)])


def average(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates."""
    return combined([(1 / len(parts), part) for part in parts])


@dataclass(frozen=True, slots=True)
class Outcome:
    """The p-values of a claim's two sides: against "it does not hold", and against "it holds"."""

    holds: float
    fails: float
    test: str


def no_worse(slack: Estimate) -> Outcome:
    """Whether an effect is above −margin (non-inferiority), or below it: `slack` is the effect and
    the margin.
    """
    return Outcome(
        slack.above(0.0), slack.below(0.0), "one-sided t test against −margin (non-inferiority)"
    )


def better(effect: Estimate, lack: Estimate) -> Outcome:
    """Whether an effect is above 0, or else smaller than would matter: `lack` is the margin less
    the effect.
    """
    return Outcome(
        effect.above(0.0),
        lack.above(0.0),
        "one-sided t test against 0; against the margin for “not”",
    )


def equivalent(over: Estimate, under: Estimate) -> Outcome:
    """Whether an effect is between two margins: two one-sided tests (TOST, Schuirmann 1987); or
    outside one of them.

    `over` is the effect less the lower margin, `under` the effect less the upper one.
    """
    outside = 2 * min(over.below(0.0), under.above(0.0))
    return Outcome(
        max(over.above(0.0), under.below(0.0)), min(1.0, outside), "TOST (two one-sided t tests)"
    )


def within(effect: Estimate, low: float, high: float) -> Outcome:
    """Whether an effect is between two fixed margins (see `equivalent`)."""
    return equivalent(effect.shifted(-low), effect.shifted(-high))


def beyond(effect: Estimate, bound: float) -> Outcome:
    """Whether an effect is below a bound, or above it."""
    return Outcome(effect.below(bound), effect.above(bound), "one-sided t test against the bound")


def every(outcomes: Sequence[Outcome]) -> Outcome:
    """Whether all of several hold (intersection-union test, Berger 1982), or some does not
    (Bonferroni).
    """
    fails = min(1.0, len(outcomes) * min(outcome.fails for outcome in outcomes))
    text = outcomes[0].test + (
        f", each of {len(outcomes)} at 5% (intersection-union)" if len(outcomes) > 1 else ""
    )
    return Outcome(max(outcome.holds for outcome in outcomes), fails, text)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for there being several (Holm 1979)."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def tost(
    first: Sequence[float], second: Sequence[float], margin: float, *, paired: bool = False
) -> float:
    """p of the null that two samples' means differ by `margin` or more: below 0.05 they are
    equivalent (TOST).

    Welch's t unless `paired`, where the samples are of the same seeds or problems, in the same
    order.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if paired:
        return float(ttost_paired(a, b, -margin, margin)[0])
    return float(ttost_ind(a, b, -margin, margin, usevar="unequal")[0])


def seeds_needed(effect: Estimate, bound: float, seeds: int) -> int | None:
    """Seeds with which this effect would be told from a bound in 4 of 5 sweeps; None when it lies
    on the bound.
    """
    gap = abs(effect.value - bound)
    if not effect.se or not seeds or gap < 1e-12 or not math.isfinite(gap):
        return None
    reach = float(special.stdtrit(max(effect.df, 1.0), 1 - ALPHA)) + float(special.ndtri(POWER))
    return max(seeds + 1, math.ceil(seeds * (reach * effect.se / gap) ** 2))
