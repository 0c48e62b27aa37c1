"""One arm of a comparison over learning rates: its best score, its best rate and its basin, each
with its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from analysis.stats.effects import Estimate
from analysis.stats.ranking import GOOD_SHARE
from analysis.stats.selection import confirmed, held_out

Floats = NDArray[np.float64]
# The basin is what keeps this share of the gain: its walls are steep there, so noise hardly moves
# its ends.
BASIN_SHARE = 0.75
# Where a basin's end falls between two tested rates, its place is uncertain by this share of their
# distance (measured on bell-shaped and cliff-edged basins at random offsets from the grid: 0.06 to
# 0.12).
GRID_ERROR = 0.12
# A gain of less than this many standard errors is no gain to speak of.
LEARNED = 5.0


@dataclass(frozen=True, slots=True)
class Basin:
    """A located basin in log10 of learning rate: per seed its ends `[K]`, and the distance of the
    rates around each.
    """

    left: Floats
    right: Floats
    left_step: float
    right_step: float

    @property
    def centres(self) -> Floats:
        """Per seed the middle of the basin, in log10 of the rate."""
        return (self.left + self.right) / 2

    @property
    def widths(self) -> Floats:
        """Per seed the basin's width in decades."""
        return self.right - self.left

    @property
    def grid_error(self) -> float:
        """The standard error of the middle that the grid's coarseness leaves; of the width it is
        twice that.
        """
        return GRID_ERROR * math.hypot(self.left_step, self.right_step) / 2


class Arm:
    """Scores by learning rate and seed, `[L, K]`; higher is better. Cells with a `bad` run are
    never chosen.
    """

    def __init__(
        self,
        lr: Floats,
        seed: Floats,
        score: Floats,
        bad: NDArray[np.bool_],
        fallback: Floats,
        confirm: NDArray[np.bool_],
        *,
        base: float,
    ) -> None:
        """From runs in any order, a column each `[N]`; a seed run again counts as run last."""
        known = np.isfinite(lr) & (np.isfinite(score) | bad)
        rates, cell = np.unique(lr[known], return_inverse=True)
        seeds, place = np.unique(seed[known & ~confirm], return_inverse=True)
        swept = ~confirm[known]
        self.log_lr: Floats = np.log10(rates)
        self.scores: Floats = np.full((len(rates), len(seeds)), math.nan)
        self.scores[cell[swept], place] = score[known][swept]
        self.bad = np.zeros(len(rates), bool)
        self.bad[cell[bad[known]]] = True
        self.runs = int(known.sum())
        fresh_seeds, fresh_place = np.unique(seed[known & confirm], return_inverse=True)
        self.fresh: Floats = np.full((len(rates), len(fresh_seeds)), math.nan)
        self.fresh[cell[~swept], fresh_place] = score[known][~swept]
        counts = np.isfinite(self.scores).sum(1)
        sums = np.where(np.isfinite(self.scores), self.scores, 0.0).sum(1)
        self.counts = counts
        self.eligible = (counts > 0) & ~self.bad
        self.means: Floats = np.where(self.eligible, sums / np.maximum(counts, 1), -np.inf)
        self.floor = (
            base
            if math.isfinite(base)
            else float(np.min(self.means, initial=np.inf, where=self.eligible))
        )
        self._cell, self._place, self._fallback = cell[swept], place, fallback[known][swept]
        self._bad_runs = bad[known][swept]

    @property
    def seeds(self) -> int:
        """How many seeds the arm's cells have at most."""
        return self.scores.shape[1]

    @cached_property
    def top(self) -> int:
        """The cell with the best mean over seeds."""
        return int(self.means.argmax())

    @property
    def gain(self) -> float:
        """The best mean over the base (or, where the base is unknown, over the worst cell)."""
        return float(self.means[self.top] - self.floor)

    @cached_property
    def good(self) -> NDArray[np.bool_]:
        """The cells that keep nine tenths of the gain."""
        return self.eligible & (self.means >= self.floor + GOOD_SHARE * self.gain)

    def noise(self, cells: NDArray[np.bool_]) -> tuple[float, float]:
        """The variance of one score between seeds, pooled over some cells, and its degrees of
        freedom.
        """
        chosen = cells & (self.counts > 1)
        df = float((self.counts[chosen] - 1).sum())
        if df == 0:
            return math.nan, 0.0
        scores = self.scores[chosen]
        return float(np.nansum((scores - np.nanmean(scores, axis=1, keepdims=True)) ** 2) / df), df

    @property
    def learned(self) -> bool:
        """Whether the gain is far more than chance among the cells would show."""
        variance, df = self.noise(self.eligible)
        # Equal scores on every seed leave no chance to exceed.
        return df > 0 and self.gain > 0 and self.gain > LEARNED * math.sqrt(variance / self.seeds)

    @property
    def edge(self) -> str | None:
        """`lowest` or `highest` where the best of the tested rates is the last on that side; None
        within the grid.
        """
        tested = len(self.means)
        if tested > 1 and 0 < self.top < tested - 1:
            return None
        return "highest" if tested > 1 and self.top else "lowest"

    @cached_property
    def peak(self) -> Estimate | None:
        """The score at the best rate, free of the choice: on fresh seeds if any, else on held-out
        ones; None for one.

        The best rate may lie between tested ones: `headroom` is counted in, with half of it as an
        error.
        """
        variance, df = self.noise(self.good)
        if df == 0 or not self.eligible.any():
            return None
        again = self.eligible & np.isfinite(self.fresh).all(1) & (self.fresh.shape[1] > 1)
        if again.sum() > 1:  # the fresh seeds say which rate is the best
            held = held_out(self.fresh, again, variance, df)
        else:
            own = self.fresh[self.top][np.isfinite(self.fresh[self.top])]
            held = confirmed(own.tolist(), self.top, variance, df) or held_out(
                self.scores, self.eligible, variance, df
            )
        if held is None:
            return None
        chance, grid = held.estimate.se**2, (self.headroom / 2) ** 2
        value = held.estimate.value + self.headroom
        return Estimate(value, math.sqrt(chance + grid), _df(chance, held.estimate.df, grid))

    @cached_property
    def headroom(self) -> float:
        """How far the score may rise above the best cell between it and its neighbours: what a
        finer grid may find.

        By parabolas through three cells; of two that cover a gap the flatter one, which a plateau
        or a cliff bears out. A cell counts for half the gain at least: a parabola across a cliff
        would rise without reason.
        """
        if self.edge is not None:
            return 0.0
        means = np.nanmean(self._curves(), axis=1) - self.floor
        heights = np.maximum(means, 0.5 * self.gain)
        rises = [self._rise(heights, low) for low in (self.top - 1, self.top)]
        return max(0.0, *rises)

    def _rise(self, heights: Floats, low: int) -> float:
        """How far the flatter parabola rises above the best cell in the gap from cell `low` to the
        next.
        """
        x, rises = self.log_lr, []
        for first in (low - 1, low):
            if first < 0 or first + 2 >= len(x):
                continue
            (a, b, c), (u, v, w) = x[first : first + 3], heights[first : first + 3]
            up = (v - u) / (b - a)
            bend = ((w - v) / (c - b) - up) / (c - a)
            summit = (a + b) / 2 - up / (2 * bend) if bend < 0 else math.inf
            within = x[low] < summit < x[low + 1]
            rises.append(
                u + (summit - a) * (up + bend * (summit - b)) - heights[self.top] if within else 0.0
            )
        return float(min(rises))

    @cached_property
    def ends(self) -> tuple[Floats, Floats, float, float]:
        """Per seed where the basin ends left and right `[K]`, NaN where the grid does first; the
        rates' steps there.
        """
        curves, level = self._curves(), self.floor + BASIN_SHARE * self.gain
        left, left_step = _end(self.log_lr[self.top :: -1], curves[self.top :: -1], level)
        right, right_step = _end(self.log_lr[self.top :], curves[self.top :], level)
        return left, right, left_step, right_step

    @property
    def basin(self) -> Basin | None:
        """The basin, where the arm learned and both its ends are within the grid on every seed;
        else None.
        """
        if self.seeds < 2 or not self.learned:
            return None
        left, right, left_step, right_step = self.ends
        return (
            Basin(left, right, left_step, right_step) if np.isfinite(left + right).all() else None
        )

    @property
    def steps_across(self) -> float | None:
        """The basin's width in steps of the tested rates at its ends; None where it is not
        located.
        """
        found = self.basin
        return (
            None
            if found is None
            else float(found.widths.mean()) / ((found.left_step + found.right_step) / 2)
        )

    def _curves(self) -> Floats:
        """Scores `[L, K]` without gaps: a bad run at what it ended with, a missing one at its
        cell's mean.
        """
        curves = self.scores.copy()
        fall = np.where(
            np.isfinite(self._fallback),
            np.minimum(self._fallback, self.means[self.top]),
            self.floor,
        )
        curves[self._cell[self._bad_runs], self._place[self._bad_runs]] = fall[self._bad_runs]
        return np.where(np.isfinite(curves), curves, np.nanmean(curves, axis=1, keepdims=True))


def _end(x: Floats, curves: Floats, level: float) -> tuple[Floats, float]:
    """Where curves `[L, K]` first fall below a level, going outward from their first cell, by
    linear interpolation.
    """
    below = curves < level
    below[0] = False
    found = np.full(curves.shape[1], math.nan)
    steps = []
    for seed in np.flatnonzero(below.any(0)):
        outer = int(below[:, seed].argmax())
        high, low = max(curves[outer - 1, seed], level), curves[outer, seed]
        share = (high - level) / (high - low)
        found[seed] = x[outer - 1] + share * (x[outer] - x[outer - 1])
        steps.append(abs(x[outer] - x[outer - 1]))
    return found, float(np.mean(steps)) if steps else math.nan


def centre(basins: Sequence[Basin], variance: float) -> Estimate:
    """The best rate's log10 as the basins' middle, with chance between seeds and the grid's
    coarseness in its error.

    `variance` of one seed's middle may be pooled over more arms. Arms on one grid err alike by its
    coarseness, so that this part of the error does not shrink with their number.
    """
    centres = np.concatenate([basin.centres for basin in basins])
    chance, grid = (
        variance / len(centres),
        float(np.mean([basin.grid_error for basin in basins])) ** 2,
    )
    df = float(len(centres) - len(basins))
    return Estimate(float(centres.mean()), math.sqrt(chance + grid), _df(chance, df, grid))


def width(basin: Basin) -> Estimate:
    """The basin's width in decades, with chance between seeds and the grid's coarseness in its
    error.
    """
    chance, grid = float(basin.widths.var(ddof=1)) / len(basin.widths), (2 * basin.grid_error) ** 2
    return Estimate(
        float(basin.widths.mean()),
        math.sqrt(chance + grid),
        _df(chance, len(basin.widths) - 1, grid),
    )


def pooled_centre_noise(basins: Sequence[Basin]) -> float:
    """The variance of one seed's middle, pooled over arms."""
    df = sum(len(basin.centres) - 1 for basin in basins)
    return sum(float(((b.centres - b.centres.mean()) ** 2).sum()) for b in basins) / df


def _df(chance: float, df: float, known: float) -> float:
    """Satterthwaite's degrees of freedom of a variance of which a part is known."""
    return df * ((chance + known) / chance) ** 2 if chance > 0 else df
