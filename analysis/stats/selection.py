"""Statistics over seeds and configurations: robust means, their intervals, and the winner's own
flattery.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.stats.effects import Estimate
from analysis.stats.ranking import Interval

Array = NDArray[np.float64]
# Cells whose means are within this many standard errors of the best compete with it.
RIVAL = 4.0


def iqm(scores: Sequence[float] | Array) -> float:
    """Interquartile mean: of the middle half of all scores (Agarwal et al. 2021)."""
    return float(stats.trim_mean(np.asarray(scores, float), 0.25, axis=None))


def stratified_bootstrap(
    strata: Sequence[Sequence[float]],
    statistic: Callable[[Array], float] = iqm,
    *,
    resamples: int = 2000,
) -> Interval:
    """95% percentile interval of a statistic of all scores, each stratum's seeds redrawn apart
    (Agarwal et al. 2021).

    `strata` holds a configuration's, or a task's, scores each. Raises ValueError where one is
    empty.
    """
    groups = [np.asarray(scores, float) for scores in strata]
    if not groups or any(len(scores) == 0 for scores in groups):
        raise ValueError("a stratum without scores cannot be resampled")
    rng = np.random.default_rng(0)
    drawn = [rng.choice(scores, (resamples, len(scores))) for scores in groups]
    values = [statistic(row) for row in np.concatenate(drawn, axis=1)]
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(
        float(low), float(high), f"{sum(map(len, groups))} runs in {len(groups)} strata"
    )


def probability_of_improvement(first: Sequence[float], second: Sequence[float]) -> float:
    """P(X > Y) + P(X = Y) / 2 for a run X of the first and Y of the second: Mann and Whitney's U
    over its maximum.
    """
    u = stats.mannwhitneyu(first, second, method="asymptotic").statistic
    return float(u) / (len(first) * len(second))


def improvement(first: Sequence[float], second: Sequence[float]) -> Interval:
    """95% stratified bootstrap interval of `probability_of_improvement`."""
    rng = np.random.default_rng(0)
    a, b = (
        rng.choice(np.asarray(scores, float), (2000, len(scores))) for scores in (first, second)
    )
    above = (a[:, :, None] > b[:, None, :]) + 0.5 * (a[:, :, None] == b[:, None, :])
    low, high = np.quantile(above.mean(axis=(1, 2)), [0.025, 0.975])
    return Interval(float(low), float(high), f"{len(first)} and {len(second)} seeds")


@dataclass(frozen=True, slots=True)
class Held:
    """A chosen cell's score as it would be seen again: `chosen` cells per fold, and the seeds it
    rests on, in words.
    """

    estimate: Estimate
    chosen: tuple[int, ...]
    how: str


def held_out(scores: Array, eligible: NDArray[np.bool_], variance: float, df: float) -> Held | None:
    """The best cell's score without the winner's curse: each seed scores the cell that the other
    seeds choose.

    `scores` `[cells, seeds]`, higher is better, NaN where there is none; `variance` of one score
    between seeds, with `df` degrees of freedom. None with fewer than two seeds. Unbiased for the
    score of what one seed fewer chooses. The folds share seeds, so cells that compete widen the
    error (`_coupling`); two at least are taken to compete.
    """
    present = np.isfinite(scores) & eligible[:, None]
    means = _of_others(np.where(present, scores, 0.0), present)
    folds = [seed for seed in range(scores.shape[1]) if np.isfinite(means[:, seed]).any()]
    chosen = [int(means[:, seed].argmax()) for seed in folds]
    kept = [(cell, seed) for cell, seed in zip(chosen, folds, strict=True) if present[cell, seed]]
    if len(kept) < 2:
        return None
    values = np.array([scores[cell, seed] for cell, seed in kept])
    error = float(np.sqrt(variance / len(kept)))
    level = np.where(
        present.any(1),
        np.where(present, scores, 0.0).sum(1) / np.maximum(present.sum(1), 1),
        -np.inf,
    )
    rivals = int((level >= level.max() - RIVAL * error).sum())
    estimate = Estimate(
        float(values.mean()), error * _coupling(len(kept), min(max(rivals, 2), 32)), df
    )
    return Held(estimate, tuple(cell for cell, _ in kept), f"{len(kept)} held-out seeds")


def _of_others(filled: Array, present: NDArray[np.bool_]) -> Array:
    """Each cell's mean over all seeds but one, `[..., cells, seeds]`; -inf where no other seed has
    a score.
    """
    others = present.sum(-1, keepdims=True) - present
    sums = filled.sum(-1, keepdims=True) - filled
    return np.where(others > 0, sums / np.maximum(others, 1), -np.inf)


@cache
def _coupling(seeds: int, rivals: int) -> float:
    """By how much the error of `held_out`'s mean exceeds that of a mean of independent scores, with
    equal rivals.
    """
    draws = np.random.default_rng(0).standard_normal((4000, rivals, seeds))
    chosen = _of_others(draws, np.ones(draws.shape, bool)).argmax(1)
    means = np.take_along_axis(draws, chosen[:, None, :], 1)[:, 0, :].mean(1)
    return max(1.0, float(means.std() * np.sqrt(seeds)))


def confirmed(fresh: Sequence[float], cell: int, variance: float, df: float) -> Held | None:
    """A chosen cell's score on fresh seeds, which had no part in choosing it; None with fewer than
    two.
    """
    if len(fresh) < 2:
        return None
    values = np.asarray(fresh, float)
    pooled_df = df + len(values) - 1
    pooled = (variance * df + float(values.var(ddof=1)) * (len(values) - 1)) / pooled_df
    estimate = Estimate(float(values.mean()), float(np.sqrt(pooled / len(values))), pooled_df)
    return Held(estimate, (cell,) * len(values), f"{len(values)} fresh seeds")


def shrunken(means: Sequence[float], variance_of_mean: float) -> list[float]:
    """Means drawn towards their average as far as their noise explains their spread (James and
    Stein 1961).

    For one seed, where no seed can be held out: `variance_of_mean` then is the evaluation's own.
    Positive part; three means or fewer are returned as they are, which is where shrinking cannot be
    told to help.
    """
    values = np.asarray(means, float)
    spread = float(((values - values.mean()) ** 2).sum())
    if len(values) <= 3 or spread == 0:
        return [float(value) for value in values]
    kept = max(0.0, 1 - (len(values) - 3) * variance_of_mean / spread)
    return [float(values.mean() + kept * (value - values.mean())) for value in values]
