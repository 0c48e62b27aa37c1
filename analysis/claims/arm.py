"""Estimate an arm's best score, best learning rate and basin, each with its error.

An arm is a set of runs that differ in learning rate and seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from analysis.stats.effects import Estimate
from analysis.stats.rates import GOOD_SHARE
from analysis.stats.selection import confirmed, held_out

Floats = NDArray[np.float64]
# The basin keeps this share of the gain. Its walls are steep there, so noise hardly moves its ends.
BASIN_SHARE = 0.75
# The end of a basin lies between two tested rates: its error is this share of their distance. It
# was measured on bell-shaped and cliff-edged basins at random offsets from the grid: 0.06 to 0.12.
GRID_ERROR = 0.12
# A gain below this many standard errors does not count as learning.
LEARNED = 5.0


@dataclass(frozen=True, slots=True)
class Basin:
    """The ends of a basin per seed `[K]`, in log10 of learning rate.

    The steps are the distances of the tested rates around each end.
    """

    left: Floats
    right: Floats
    left_step: float
    right_step: float

    @property
    def centres(self) -> Floats:
        """The middle of the basin per seed, in log10 of the rate."""
        return (self.left + self.right) / 2

    @property
    def widths(self) -> Floats:
        """The width of the basin per seed, in decades."""
        return self.right - self.left

    @property
    def grid_error(self) -> float:
        """The standard error of the middle due to the grid; that of the width is twice as large."""
        return GRID_ERROR * math.hypot(self.left_step, self.right_step) / 2


class Arm:
    """Scores by learning rate and seed `[L, K]`, higher is better.

    A learning rate with a `bad` run is never chosen. Runs come in any order, a column each `[N]`;
    of a repeated seed the last run counts.
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
        self.counts = np.isfinite(self.scores).sum(1)
        sums = np.where(np.isfinite(self.scores), self.scores, 0.0).sum(1)
        self.eligible = (self.counts > 0) & ~self.bad
        means = sums / np.maximum(self.counts, 1)
        self.means: Floats = np.where(self.eligible, means, -np.inf)
        worst = float(np.min(self.means, initial=np.inf, where=self.eligible))
        self.floor = base if math.isfinite(base) else worst
        self._cell, self._place, self._fallback = cell[swept], place, fallback[known][swept]
        self._bad_runs = bad[known][swept]

    @property
    def seeds(self) -> int:
        """The most seeds that a learning rate has."""
        return self.scores.shape[1]

    @cached_property
    def top(self) -> int:
        """The index of the learning rate with the best mean over seeds."""
        return int(self.means.argmax())

    @property
    def gain(self) -> float:
        """The best mean less the base, or less the worst rate where the base is unknown."""
        return float(self.means[self.top] - self.floor)

    @cached_property
    def good(self) -> NDArray[np.bool_]:
        """The learning rates that keep nine tenths of the gain."""
        return self.eligible & (self.means >= self.floor + GOOD_SHARE * self.gain)

    def noise(self, cells: NDArray[np.bool_]) -> tuple[float, float]:
        """Return the variance of one score between seeds, pooled over rates, and its degrees."""
        chosen = cells & (self.counts > 1)
        df = float((self.counts[chosen] - 1).sum())
        if df == 0:
            return math.nan, 0.0
        scores = self.scores[chosen]
        return float(np.nansum((scores - np.nanmean(scores, axis=1, keepdims=True)) ** 2) / df), df

    @property
    def learned(self) -> bool:
        """Whether the gain is far more than chance between seeds explains."""
        variance, df = self.noise(self.eligible)
        # Equal scores on every seed leave no chance to exceed.
        return df > 0 and self.gain > 0 and self.gain > LEARNED * math.sqrt(variance / self.seeds)

    @property
    def edge(self) -> str | None:
        """`lowest` or `highest` where the best rate is the last tested on that side, else None."""
        tested = len(self.means)
        if tested > 1 and 0 < self.top < tested - 1:
            return None
        return "highest" if tested > 1 and self.top else "lowest"

    @cached_property
    def peak(self) -> Estimate | None:
        """The score at the best rate, corrected for selection bias; None with one seed.

        It rests on fresh seeds where there are any, else on held-out ones. The best rate may lie
        between tested ones: `headroom` is added, with half of it as an error.
        """
        variance, df = self.noise(self.good)
        if df == 0 or not self.eligible.any():
            return None
        again = self.eligible & np.isfinite(self.fresh).all(1) & (self.fresh.shape[1] > 1)
        if again.sum() > 1:  # the fresh seeds decide which rate is the best
            held = held_out(self.fresh, again, variance, df)
        else:
            fresh = self.fresh[self.top][np.isfinite(self.fresh[self.top])]
            held = confirmed(fresh.tolist(), self.top, variance, df) or held_out(
                self.scores, self.eligible, variance, df
            )
        if held is None:
            return None
        value = held.estimate.value + self.headroom
        return _with_known(value, held.estimate.se**2, held.estimate.df, (self.headroom / 2) ** 2)

    @cached_property
    def headroom(self) -> float:
        """How far a finer grid may rise above the best tested rate.

        Parabolas through three rates; of two that cover a gap the flatter one, which agrees with a
        plateau or a cliff. A rate counts for at least half of the gain, because a parabola across a
        cliff would rise without reason.
        """
        if self.edge is not None:
            return 0.0
        means = np.nanmean(self._curves(), axis=1) - self.floor
        heights = np.maximum(means, 0.5 * self.gain)
        x, rises = self.log_lr, [0.0]
        for low in (self.top - 1, self.top):
            flatter = []
            for first in (low - 1, low):
                if first < 0 or first + 2 >= len(x):
                    continue
                (a, b, c), (u, v, w) = x[first : first + 3], heights[first : first + 3]
                up = (v - u) / (b - a)
                bend = ((w - v) / (c - b) - up) / (c - a)
                summit = (a + b) / 2 - up / (2 * bend) if bend < 0 else math.inf
                rise = 0.0
                if x[low] < summit < x[low + 1]:
                    rise = u + (summit - a) * (up + bend * (summit - b)) - heights[self.top]
                flatter.append(rise)
            rises.append(float(min(flatter)))
        return max(rises)

    @cached_property
    def ends(self) -> tuple[Floats, Floats, float, float]:
        """The left and right end of the basin per seed `[K]`, and the steps of the rates there.

        NaN where the grid ends first.
        """
        curves, level = self._curves(), self.floor + BASIN_SHARE * self.gain
        left, left_step = _end(self.log_lr[self.top :: -1], curves[self.top :: -1], level)
        right, right_step = _end(self.log_lr[self.top :], curves[self.top :], level)
        return left, right, left_step, right_step

    @property
    def basin(self) -> Basin | None:
        """The basin, where the arm learned and the grid holds both ends on every seed."""
        if self.seeds < 2 or not self.learned:
            return None
        left, right, left_step, right_step = self.ends
        if not np.isfinite(left + right).all():
            return None
        return Basin(left, right, left_step, right_step)

    @property
    def steps_across(self) -> float | None:
        """The basin's width in steps of the tested rates at its ends; None where not located."""
        basin = self.basin
        if basin is None:
            return None
        return float(basin.widths.mean()) / ((basin.left_step + basin.right_step) / 2)

    def _curves(self) -> Floats:
        """Return scores `[L, K]` without gaps.

        A bad run has the score it ended with, a missing one the mean of its learning rate.
        """
        curves = self.scores.copy()
        ended = np.minimum(self._fallback, self.means[self.top])
        fall = np.where(np.isfinite(self._fallback), ended, self.floor)
        curves[self._cell[self._bad_runs], self._place[self._bad_runs]] = fall[self._bad_runs]
        return np.where(np.isfinite(curves), curves, np.nanmean(curves, axis=1, keepdims=True))


def _end(x: Floats, curves: Floats, level: float) -> tuple[Floats, float]:
    """Return where curves `[L, K]` first fall below a level, by linear interpolation."""
    below = curves < level
    below[0] = False
    ends = np.full(curves.shape[1], math.nan)
    steps = []
    for seed in np.flatnonzero(below.any(0)):
        outer = int(below[:, seed].argmax())
        high, low = max(curves[outer - 1, seed], level), curves[outer, seed]
        ends[seed] = x[outer - 1] + (high - level) / (high - low) * (x[outer] - x[outer - 1])
        steps.append(abs(x[outer] - x[outer - 1]))
    return ends, float(np.mean(steps)) if steps else math.nan


def centre(basins: Sequence[Basin], variance: float) -> Estimate:
    """Return the best rate's log10 as the middle of the basins.

    `variance` of one seed's middle may be pooled over more arms. Arms on one grid share the error
    of its coarseness, so that this part does not shrink with their number.
    """
    centres = np.concatenate([basin.centres for basin in basins])
    grid = float(np.mean([basin.grid_error for basin in basins])) ** 2
    df = float(len(centres) - len(basins))
    return _with_known(float(centres.mean()), variance / len(centres), df, grid)


def width(basin: Basin) -> Estimate:
    """Return the basin's width in decades."""
    chance = float(basin.widths.var(ddof=1)) / len(basin.widths)
    grid = (2 * basin.grid_error) ** 2
    return _with_known(float(basin.widths.mean()), chance, len(basin.widths) - 1, grid)


def pooled_centre_noise(basins: Sequence[Basin]) -> float:
    """Return the variance of one seed's middle, pooled over arms."""
    df = sum(len(basin.centres) - 1 for basin in basins)
    return sum(float(((b.centres - b.centres.mean()) ** 2).sum()) for b in basins) / df


def _with_known(value: float, chance: float, df: float, known: float) -> Estimate:
    """Return an estimate with an estimated (`chance`) and a known part of its variance.

    Its degrees of freedom are Satterthwaite's.
    """
    total = ((chance + known) / chance) ** 2 if chance > 0 else 1.0
    return Estimate(value, math.sqrt(chance + known), df * total)
