"""Test an estimated effect against a margin: better, no worse, equivalent; one or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special
from statsmodels.stats.multitest import multipletests

ALPHA = 0.05
POWER = 0.8
# A difference below this share of what training gained does not matter.
GAIN_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Estimate:
    """An effect with its standard error and degrees of freedom.

    Without an error, infinite degrees of freedom mean an exact value. Finite ones mean that too few
    seeds ran to differ, which excludes nothing.
    """

    value: float
    se: float
    df: float

    def above(self, bound: float) -> float:
        """Return the one-sided p of the null that the effect is at most `bound` (Student's t)."""
        if self.se == 0:
            return float(self.value <= bound) if math.isinf(self.df) else 1.0
        return float(special.stdtr(self.df, (bound - self.value) / self.se))

    def below(self, bound: float) -> float:
        """Return the one-sided p of the null that the effect is at least `bound`."""
        return self.scaled(-1.0).above(-bound)

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Return the 1 - 2 alpha interval, whose ends two one-sided tests at `alpha` exclude."""
        reach = self.se * float(special.stdtrit(self.df, 1 - alpha)) if self.se else 0.0
        return self.value - reach, self.value + reach

    def scaled(self, factor: float) -> Estimate:
        """Return the effect in another unit."""
        return Estimate(self.value * factor, self.se * abs(factor), self.df)

    def shifted(self, by: float) -> Estimate:
        """Return the effect plus a constant."""
        return Estimate(self.value + by, self.se, self.df)


def combined(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Return a weighted sum of independent estimates.

    Its degrees of freedom are those of Welch and Satterthwaite (Welch 1947).
    """
    value = sum(weight * part.value for weight, part in parts)
    variances = [(weight * part.se) ** 2 for weight, part in parts]
    total = sum(variances)
    spread = sum(v * v / part.df for v, (_, part) in zip(variances, parts, strict=True) if v)
    df = total * total / spread if spread else min(part.df for _, part in parts)
    return Estimate(value, math.sqrt(total), df)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """Return the first estimate less the second; they are independent (Welch 1947)."""
    return combined([(1.0, first), (-1.0, second)])


def average(parts: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates."""
    return combined([(1 / len(parts), part) for part in parts])


@dataclass(frozen=True, slots=True)
class Outcome:
    """p-values of a statement: of the null that it does not hold, and of the null that it holds."""

    holds: float
    fails: float
    test: str


def no_worse(slack: Estimate) -> Outcome:
    """Test whether an effect is above −margin (non-inferiority); `slack` is effect plus margin."""
    test = "one-sided t test against −margin (non-inferiority)"
    return Outcome(slack.above(0.0), slack.below(0.0), test)


def better(effect: Estimate, lack: Estimate) -> Outcome:
    """Test whether an effect is above 0, or below the margin; `lack` is margin less effect."""
    test = "one-sided t test against 0; against the margin for “not”"
    return Outcome(effect.above(0.0), lack.above(0.0), test)


def equivalent(over: Estimate, under: Estimate) -> Outcome:
    """Test whether an effect is between two margins (TOST, Schuirmann 1987), or outside.

    `over` is the effect less the lower margin, `under` the effect less the upper one.
    """
    outside = 2 * min(over.below(0.0), under.above(0.0))
    return Outcome(
        max(over.above(0.0), under.below(0.0)), min(1.0, outside), "TOST (two one-sided t tests)"
    )


def within(effect: Estimate, low: float, high: float) -> Outcome:
    """Test whether an effect is between two fixed margins (see `equivalent`)."""
    return equivalent(effect.shifted(-low), effect.shifted(-high))


def beyond(effect: Estimate, bound: float) -> Outcome:
    """Test whether an effect is below a bound, or above it."""
    return Outcome(effect.below(bound), effect.above(bound), "one-sided t test against the bound")


def every(outcomes: Sequence[Outcome]) -> Outcome:
    """Test whether all of several statements hold (intersection-union test, Berger 1982).

    That one of them fails is tested with Bonferroni's correction.
    """
    fails = min(1.0, len(outcomes) * min(outcome.fails for outcome in outcomes))
    text = outcomes[0].test
    if len(outcomes) > 1:
        text += f", each of {len(outcomes)} at 5% (intersection-union)"
    return Outcome(max(outcome.holds for outcome in outcomes), fails, text)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for multiple tests (Holm 1979)."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if len(p_values) else []


def seeds_needed(effect: Estimate, bound: float, seeds: int) -> int | None:
    """Return how many seeds tell this effect from a bound with a power of 80%.

    None when the effect lies on the bound, or its error is not known.
    """
    gap = abs(effect.value - bound)
    if not effect.se or not seeds or gap < 1e-12 or not math.isfinite(gap):
        return None
    reach = float(special.stdtrit(max(effect.df, 1.0), 1 - ALPHA)) + float(special.ndtri(POWER))
    return max(seeds + 1, math.ceil(seeds * (reach * effect.se / gap) ** 2))
