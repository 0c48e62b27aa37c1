"""Read the scores of a sweep per configuration and seed: chance between seeds, collapsed seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.stats.effects import ALPHA, Estimate
from analysis.stats.selection import Held, held_out

# Seeds differ in another way where training hardly works, so the chance between seeds is pooled
# over the configurations that keep this share of the best gain.
COMPETING = 0.75
# A seed has collapsed when it lost this share of what the best seed of its configuration gained,
# and more than this many standard deviations of other configurations' seeds.
COLLAPSE_SHARE, COLLAPSE_SPREAD = 0.5, 6.0

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SeedNoise:
    """The variance of one score between seeds: pooled with its degrees of freedom, and by value."""

    pooled: float
    df: float
    own: dict[Any, float]

    def of(self, value: Any) -> float:
        """Return the variance to use for a value: the pooled one, or its own where larger."""
        return max(self.pooled, self.own.get(value, 0.0))


@dataclass(frozen=True)
class SweepScores:
    """A sweep's scores `[configurations, seeds]`, higher is better, NaN where there is none.

    `swept` has the sweep's seeds, `fresh` those of re-runs. `cells` has a row of settings for each
    configuration. `whole` marks configurations with all the sweep's seeds, `confirmed` ones with
    all fresh seeds (two or more), `competing` ones that kept most of the best gain. `collapsed`
    counts collapsed seeds.
    """

    swept: Floats
    fresh: Floats
    cells: pd.DataFrame
    whole: Mask
    confirmed: Mask
    collapsed: NDArray[np.int64]
    means: Floats
    competing: Mask
    gain: float

    @classmethod
    def of(cls, runs: pd.DataFrame, floor: float | None, sign: float) -> SweepScores:
        """Read the table of runs; a run that diverged without a score counts as no gain."""
        known = runs[runs["configuration"].notna()].assign(score=sign * runs["score"])
        if floor is not None and "diverged" in known:
            diverged = known["score"].isna() & known["diverged"].fillna(False).astype(bool)
            known["score"] = known["score"].mask(diverged, sign * floor)
        again = known["confirm"].astype(bool)
        cells = known[~again].drop_duplicates("configuration")
        cells = cells.set_index("configuration", drop=False).sort_index()
        scores, fresh = (_by_seed(rows, cells.index) for rows in (known[~again], known[again]))
        whole = np.asarray(np.isfinite(scores).all(axis=1))
        confirmed = np.asarray(np.isfinite(fresh).all(axis=1) & whole & (fresh.shape[1] > 1))
        # A configuration is judged by its fresh seeds where it has them all.
        means = np.where(whole, np.where(np.isfinite(scores), scores, 0.0).mean(axis=1), -np.inf)
        if confirmed.any():
            means[confirmed] = fresh[confirmed].mean(axis=1)
        low = sign * floor if floor is not None else float(means[whole].min(initial=0.0))
        collapsed = _collapsed(np.concatenate([scores, fresh], axis=1), low)
        stable = whole & (collapsed == 0)
        best = float(means[stable if stable.any() else whole].max(initial=low))
        gain = max(0.0, best - low)
        competing = stable & (means >= low + COMPETING * gain)
        return cls(scores, fresh, cells, whole, confirmed, collapsed, means, competing, gain)

    @property
    def stable(self) -> Mask:
        """Configurations with all seeds of the sweep, none of them collapsed."""
        return self.whole & (self.collapsed == 0)

    def top(self, among: Mask) -> int:
        """Return the row of the configuration with the best mean among some."""
        return int(np.where(among, self.means, -np.inf).argmax())

    def noise(self, values: NDArray[Any]) -> SeedNoise:
        """Return the chance between seeds: pooled over competing configurations, and by value.

        The pooled variance has Satterthwaite's degrees of freedom, as values may differ in noise
        (Box 1954).
        """
        squares: dict[Any, float] = {}
        counts: dict[Any, int] = {}
        for value in pd.unique(values[self.whole]):
            mine = self.stable & (values == value)
            # A value that competes nowhere still has a noise of its own.
            used = mine & self.competing if (mine & self.competing).any() else mine
            for cell in np.flatnonzero(used):
                groups = [self.swept[cell]]
                groups += [self.fresh[cell]] if self.confirmed[cell] else []
                for scores in groups:
                    square = float(((scores - scores.mean()) ** 2).sum())
                    squares[value] = squares.get(value, 0.0) + square
                    counts[value] = counts.get(value, 0) + len(scores) - 1
        variances = {value: squares[value] / count for value, count in counts.items() if count}
        pooled = [value for value in variances if (self.competing & (values == value)).any()]
        total = sum(squares[value] for value in pooled)
        df = float(sum(counts[value] for value in pooled))
        if not df or not total:
            return SeedNoise(0.0, df, variances)
        effective = total**2 / sum(squares[value] ** 2 / counts[value] for value in pooled)
        return SeedNoise(total / df, effective, variances)

    def held(self, among: Mask, variance: float, df: float) -> Held | None:
        """Return the best score among some configurations, corrected for selection bias.

        It rests on fresh seeds where some configurations have them, else on the sweep's. Each seed
        scores the configuration that the other seeds choose. None with fewer than two seeds.
        """
        kind, table, rows = "fresh seeds", self.fresh, among & self.confirmed
        if not rows.any():
            kind, table, rows = "seeds", self.swept, among & self.whole
        count = table.shape[1]
        if not rows.any() or count < 2 or not df:
            return None
        if rows.sum() > 1:
            held = held_out(table, rows, variance, df)
            how = f"{count} {kind}, each scoring what the others choose"
            return held and Held(held.estimate, held.chosen, how)
        cell = int(rows.argmax())
        estimate = Estimate(float(table[cell].mean()), math.sqrt(variance / count), df)
        return Held(estimate, (cell,) * count, f"{count} {kind}")


def expected(runs: pd.DataFrame, floor: float | None, *, maximize: bool) -> Held | None:
    """Return the best configuration's score corrected for selection bias, as the metric counts.

    None with fewer than two seeds, or where a seed of every configuration collapsed.
    """
    sign = 1.0 if maximize else -1.0
    scores = SweepScores.of(runs, floor, sign)
    values = scores.cells.index.to_numpy()
    noise = scores.noise(values)
    among = scores.competing & scores.confirmed
    among = among if among.any() else scores.competing
    if not among.any():
        return None
    held = scores.held(among, noise.of(values[scores.top(among)]), noise.df)
    return held and Held(held.estimate.scaled(sign), held.chosen, held.how)


def could_collapse(seeds: int) -> float:
    """Return the upper 95% bound of the share of collapsing seeds after `seeds` without one."""
    return 1 - ALPHA ** (1 / seeds)


def seeds_to_bound(share: float) -> int:
    """Return how many seeds without a collapse bound the share of collapsing seeds, with 95%."""
    return math.ceil(math.log(ALPHA) / math.log(1 - share))


def _by_seed(runs: pd.DataFrame, numbers: pd.Index) -> Floats:
    """Return scores `[configurations, seeds]`, NaN for none; of a repeated seed the last."""
    rows = numbers.get_indexer(pd.Index(runs["configuration"]))
    seeds, columns = np.unique(runs["seed"].to_numpy(), return_inverse=True)
    table = np.full((len(numbers), len(seeds)), math.nan)
    # A configuration that only re-runs have has no row.
    table[rows[rows >= 0], columns[rows >= 0]] = runs["score"].to_numpy(float)[rows >= 0]
    return table


def _collapsed(scores: Floats, low: float) -> NDArray[np.int64]:
    """Count the collapsed seeds of each configuration of `scores` `[configurations, seeds]`."""
    known = np.isfinite(scores)
    best = np.where(known, scores, -np.inf).max(axis=1, initial=-np.inf)
    drops = np.where(known, best[:, None] - np.where(known, scores, 0.0), 0.0)
    spreads = np.array(
        [
            row[mask].std(ddof=1) if mask.sum() > 1 else math.nan
            for row, mask in zip(scores, known, strict=True)
        ]
    )
    count = np.zeros(len(scores), dtype=np.int64)
    for cell, drop in enumerate(drops):
        others = np.delete(spreads, cell)
        spread = float(np.median(others[np.isfinite(others)])) if np.isfinite(others).any() else 0.0
        limit = max(COLLAPSE_SHARE * (best[cell] - low), COLLAPSE_SPREAD * spread)
        count[cell] = int((drop > limit).sum())
    return count
