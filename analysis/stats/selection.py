"""Correct the score of a chosen configuration for selection bias (the winner's curse)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from analysis.stats.effects import Estimate

Array = NDArray[np.float64]
# Cells whose means are within this many standard errors of the best compete with it.
RIVAL = 4.0


@dataclass(frozen=True, slots=True)
class Held:
    """A chosen cell's score corrected for selection bias.

    `chosen` has the cell that each fold chose; `how` says in words which seeds the score rests on.
    """

    estimate: Estimate
    chosen: tuple[int, ...]
    how: str


def held_out(scores: Array, eligible: NDArray[np.bool_], variance: float, df: float) -> Held | None:
    """Estimate the best cell's score: each seed scores the cell that the other seeds choose.

    `scores` is `[cells, seeds]`, higher is better, NaN where there is none. `variance` is that of
    one score between seeds, with `df` degrees of freedom. None with fewer than two seeds. The
    result is unbiased for the score of a choice by one seed fewer. Folds share seeds, so competing
    cells widen the error (`_coupling`); at least two are taken to compete.
    """
    present = np.isfinite(scores) & eligible[:, None]
    filled = np.where(present, scores, 0.0)
    means = _mean_of_others(filled, present)
    folds = [seed for seed in range(scores.shape[1]) if np.isfinite(means[:, seed]).any()]
    chosen = [int(means[:, seed].argmax()) for seed in folds]
    kept = [(cell, seed) for cell, seed in zip(chosen, folds, strict=True) if present[cell, seed]]
    if len(kept) < 2:
        return None
    values = np.array([scores[cell, seed] for cell, seed in kept])
    error = float(np.sqrt(variance / len(kept)))
    mean = np.where(present.any(1), filled.sum(1) / np.maximum(present.sum(1), 1), -np.inf)
    rivals = int((mean >= mean.max() - RIVAL * error).sum())
    estimate = Estimate(
        float(values.mean()), error * _coupling(len(kept), min(max(rivals, 2), 32)), df
    )
    return Held(estimate, tuple(cell for cell, _ in kept), f"{len(kept)} held-out seeds")


def _mean_of_others(filled: Array, present: NDArray[np.bool_]) -> Array:
    """Return each cell's mean over all seeds but one, `[..., cells, seeds]`; -inf without any."""
    others = present.sum(-1, keepdims=True) - present
    sums = filled.sum(-1, keepdims=True) - filled
    return np.where(others > 0, sums / np.maximum(others, 1), -np.inf)


@cache
def _coupling(seeds: int, rivals: int) -> float:
    """Return by what factor shared seeds widen the error of `held_out`, for equal rivals."""
    draws = np.random.default_rng(0).standard_normal((4000, rivals, seeds))
    chosen = _mean_of_others(draws, np.ones(draws.shape, bool)).argmax(1)
    means = np.take_along_axis(draws, chosen[:, None, :], 1)[:, 0, :].mean(1)
    return max(1.0, float(means.std() * np.sqrt(seeds)))


def confirmed(fresh: Sequence[float], cell: int, variance: float, df: float) -> Held | None:
    """Estimate a chosen cell's score on fresh seeds; None with fewer than two."""
    if len(fresh) < 2:
        return None
    values = np.asarray(fresh, float)
    pooled_df = df + len(values) - 1
    pooled = (variance * df + float(values.var(ddof=1)) * (len(values) - 1)) / pooled_df
    estimate = Estimate(float(values.mean()), float(np.sqrt(pooled / len(values))), pooled_df)
    return Held(estimate, (cell,) * len(values), f"{len(values)} fresh seeds")


def shrunken(means: Sequence[float], variance_of_mean: float) -> list[float]:
    """Shrink means towards their average (James and Stein 1961, positive part).

    For one seed, where no seed can be held out: `variance_of_mean` then is the evaluation's. Three
    means or fewer are returned as they are, because shrinking need not help there.
    """
    values = np.asarray(means, float)
    spread = float(((values - values.mean()) ** 2).sum())
    if len(values) <= 3 or spread == 0:
        return [float(value) for value in values]
    kept = max(0.0, 1 - (len(values) - 3) * variance_of_mean / spread)
    return [float(values.mean() + kept * (value - values.mean())) for value in values]
