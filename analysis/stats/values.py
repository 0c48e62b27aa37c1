"""The values of one setting compared, each at its best configuration; all pairs are tested
together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtri
from statsmodels.stats.libqsturng import qsturng

from analysis.data.labels import ALPHA as ALPHA_KEY
from analysis.data.labels import LR, RANK, TARGETS
from analysis.stats.effects import ALPHA, POWER, Estimate
from analysis.stats.selection import Held, held_out

Standing = Literal["chosen", "worse", "tied", "better", "unstable", "open"]
Verdict = Literal["best", "tied", "open"]
# Seeds differ otherwise where training hardly works: chance is pooled over what keeps this share of
# the best gain.
COMPETING = 0.75
# A difference below this share of what training gained is no difference (as for the claims).
GAIN_SHARE = 0.1
# Adapters whose trained parameters differ by less than this share are of equal size.
EQUAL_SIZE = 0.05
# A seed has collapsed when it lost this share of what the best seed of its configuration gained,
# and by far more than the seeds of other configurations differ: so many of their standard
# deviations.
COLLAPSE_SHARE, COLLAPSE_SPREAD = 0.5, 6.0
# Seeds that the page asks for: with none collapsed, they bound the share of seeds that collapse.
COLLAPSE_BOUND = 0.2

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Level:
    """A value of a setting, by the score of its best configuration.

    `mean` and `score` are in the metric's own direction; `score` (None without two seeds) is free
    of the choice of the best configuration. `ahead` is how far the chosen value is ahead, with its
    simultaneous 95% interval. `seeds` is how many the score rests on, `collapsed` how many of the
    best configuration's `tried` seeds, fresh ones included, collapsed. `fair`: it was tried beside
    the chosen value's other settings.
    """

    value: Any
    mean: float
    score: Estimate | None
    ahead: Estimate | None
    interval: tuple[float, float] | None
    configurations: int
    seeds: int
    collapsed: int
    tried: int
    fair: bool
    standing: Standing


@dataclass(frozen=True, slots=True)
class Comparison:
    """A setting's values in order, one of them chosen; `margin` is the difference that would
    matter.

    `judged` is how many values are tested against each other.
    """

    column: str
    chosen: Level
    levels: tuple[Level, ...]
    margin: float
    judged: int

    def of(self, *standings: Standing) -> list[Level]:
        """Return the levels that stand so."""
        return [level for level in self.levels if level.standing in standings]

    @property
    def others(self) -> list[Level]:
        """All levels but the chosen one."""
        return [level for level in self.levels if level.standing != "chosen"]

    @property
    def verdict(self) -> Verdict:
        """`best`: every other value is worse; `tied`: every other is worse or tied; else `open`."""
        if not self.others or self.chosen.collapsed or self.of("better", "unstable", "open"):
            return "open"
        return "tied" if self.of("tied") else "best"

    def seeds_needed(self, level: Level, most: int) -> int | None:
        """Return with how many seeds a level would be told apart, or tied, in 4 of 5 sweeps; None
        above `most`.
        """
        if level.ahead is None or not level.ahead.se:
            return None
        gap = abs(level.ahead.value)
        target = max(gap, self.margin - gap)
        for seeds in range(level.seeds + 1, most + 1):
            df = level.ahead.df * (seeds - 1) / (level.seeds - 1)
            se = level.ahead.se * math.sqrt(level.seeds / seeds)
            if (_reach(self.judged, df) + float(ndtri(POWER))) * se < target:
                return seeds
        return None


@dataclass(frozen=True, slots=True)
class _Noise:
    """The variance of one score between seeds: pooled, with its degrees of freedom, and each
    value's own.
    """

    pooled: float
    df: float
    own: dict[Any, float]

    def of(self, value: Any) -> float:
        """The variance to use for a value: the pooled one, or its own where that is larger."""
        return max(self.pooled, self.own.get(value, 0.0))


@dataclass(frozen=True)
class _Scores:
    """A sweep's scores, higher is better: `swept` and `fresh` `[configurations, seeds]`, NaN where
    there is none.

    `cells` has a row of settings for each configuration. `whole`: it has all seeds of the sweep;
    `confirmed`: all fresh seeds, two or more; `collapsed`: how many of its seeds collapsed;
    `competing`: it kept most of the best gain.
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
    def of(cls, runs: pd.DataFrame, floor: float | None, sign: float) -> _Scores:
        """Read `Tables.runs`; a run that diverged without a score counts as having gained
        nothing.
        """
        known = runs[runs["configuration"].notna()].assign(score=sign * runs["score"])
        if floor is not None and "diverged" in known:
            diverged = known["score"].isna() & known["diverged"].fillna(False).astype(bool)
            known["score"] = known["score"].mask(diverged, sign * floor)
        again = known["confirm"].astype(bool)
        cells = (
            known[~again]
            .drop_duplicates("configuration")
            .set_index("configuration", drop=False)
            .sort_index()
        )
        scores, fresh = (_table(rows, cells.index) for rows in (known[~again], known[again]))
        whole = np.asarray(np.isfinite(scores).all(axis=1))
        confirmed = np.asarray(np.isfinite(fresh).all(axis=1) & whole & (fresh.shape[1] > 1))
        # What a configuration is judged by: fresh seeds where it has them all.
        means = np.where(whole, np.where(np.isfinite(scores), scores, 0.0).mean(axis=1), -np.inf)
        if confirmed.any():
            means[confirmed] = fresh[confirmed].mean(axis=1)
        low = sign * floor if floor is not None else float(means[whole].min(initial=0.0))
        collapsed = _collapsed(np.concatenate([scores, fresh], axis=1), low)
        stable = whole & (collapsed == 0)
        best = float(means[stable if stable.any() else whole].max(initial=low))
        gain = max(0.0, best - low)
        return cls(
            scores,
            fresh,
            cells,
            whole,
            confirmed,
            collapsed,
            means,
            stable & (means >= low + COMPETING * gain),
            gain,
        )

    @property
    def stable(self) -> Mask:
        """Which configurations have all seeds of the sweep, none of them collapsed."""
        return self.whole & (self.collapsed == 0)

    def noise(self, values: NDArray[Any]) -> _Noise:
        """Chance between seeds, pooled over the competing configurations, and by value.

        The pooled variance has Satterthwaite's degrees of freedom, as values may differ in noise
        (Box 1954).
        """
        squares: dict[Any, float] = {}
        counts: dict[Any, int] = {}
        for value in pd.unique(values[self.whole]):
            mine = self.stable & (values == value)
            # A value that nowhere competes still has noise of its own.
            for cell in np.flatnonzero(
                mine & self.competing if (mine & self.competing).any() else mine
            ):
                for scores in (
                    (self.swept[cell], self.fresh[cell])
                    if self.confirmed[cell]
                    else (self.swept[cell],)
                ):
                    squares[value] = squares.get(value, 0.0) + float(
                        ((scores - scores.mean()) ** 2).sum()
                    )
                    counts[value] = counts.get(value, 0) + len(scores) - 1
        own = {value: squares[value] / count for value, count in counts.items() if count}
        pooled = [value for value in own if (self.competing & (values == value)).any()]
        total, df = (
            sum(squares[value] for value in pooled),
            float(sum(counts[value] for value in pooled)),
        )
        if not df or not total:
            return _Noise(0.0, df, own)
        return _Noise(
            total / df, total**2 / sum(squares[value] ** 2 / counts[value] for value in pooled), own
        )

    def held(self, among: Mask, variance: float, df: float) -> Held | None:
        """Return the best score among some configurations, corrected for selection bias; None
        without two seeds.

        It is taken on fresh seeds where some of them have these, else on the sweep's seeds. Where
        there is a choice, each seed scores the configuration that the other seeds choose.
        """
        kind, table, rows = "fresh seeds", self.fresh, among & self.confirmed
        if not rows.any():
            kind, table, rows = "seeds", self.swept, among & self.whole
        count = table.shape[1]
        if not rows.any() or count < 2 or not df:
            return None
        if rows.sum() > 1:
            found = held_out(table, rows, variance, df)
            return found and Held(
                found.estimate, found.chosen, f"{count} {kind}, each scoring what the others choose"
            )
        cell = int(rows.argmax())
        estimate = Estimate(float(table[cell].mean()), math.sqrt(variance / count), df)
        return Held(estimate, (cell,) * count, f"{count} {kind}")


def compare_values(
    runs: pd.DataFrame,
    column: str,
    winner: int,
    others: Sequence[str],
    floor: float | None,
    *,
    maximize: bool,
) -> Comparison | None:
    """Compare the values of a column with that of the winning configuration; None where that has no
    score.

    Intervals of all differences between values hold together with 95% (Tukey 1949, Kramer 1956), so
    that at most 5% of sweeps call a value worse that is not. `others` are the other swept settings'
    columns: a value that was tried only with others than the winner's stays open, whatever it
    scored. `floor` is the base's score; the margin is a share of the gain.
    """
    sign = 1.0 if maximize else -1.0
    scores = _Scores.of(runs[runs[column].notna()], floor, sign)
    cells = scores.cells
    if winner not in cells.index or not scores.whole[cells.index.get_loc(winner)]:
        return None
    chosen, values = cells[cells.index == winner].iloc[0], cells[column].to_numpy()
    noise = scores.noise(values)
    found: dict[Any, tuple[Mask, Held | None, bool]] = {}
    for value in sorted(pd.unique(values[scores.whole])):
        mask = scores.whole & (values == value)
        alike = value == chosen[column] or column == "configuration"
        fair = alike or _fair(column, cells[mask], scores.means[mask], chosen, others)
        # Configurations of which a seed collapsed are not averaged: what they score is a matter of
        # luck.
        found[value] = mask, scores.held(mask & scores.stable, noise.of(value), noise.df), fair
    judged = sum(held is not None and fair for _, held, fair in found.values())
    reach = _reach(judged, noise.df) if judged > 1 else math.inf
    margin, first, levels = GAIN_SHARE * scores.gain, found[chosen[column]][1], []
    for value, (mask, held, fair) in found.items():
        top = int(np.where(mask, scores.means, -np.inf).argmax())
        collapsed = 0 if (mask & scores.stable).any() else int(scores.collapsed[top])
        tried = int(np.isfinite([*scores.swept[top], *scores.fresh[top]]).sum())
        ahead, span = None, None
        if first is not None and held is not None and value != chosen[column]:
            gap = first.estimate.value - held.estimate.value
            ahead = Estimate(gap, math.hypot(first.estimate.se, held.estimate.se), noise.df)
            # Seeds that did not differ at all leave no measure of chance.
            span = (gap - reach * ahead.se, gap + reach * ahead.se) if ahead.se else None
        standing: Standing = "chosen"
        if value != chosen[column]:
            standing = "unstable" if collapsed else _standing(span, margin) if fair else "open"
        levels.append(
            Level(
                value,
                sign * float(scores.means[top]),
                None if held is None else held.estimate.scaled(sign),
                ahead,
                span,
                int(mask.sum()),
                len(held.chosen) if held else scores.swept.shape[1],
                collapsed,
                tried,
                fair,
                standing,
            )
        )
    return Comparison(
        column,
        next(one for one in levels if one.standing == "chosen"),
        tuple(levels),
        margin,
        judged,
    )


def expected(runs: pd.DataFrame, floor: float | None, *, maximize: bool) -> Held | None:
    """Return the best configuration's score as it would be seen again, free of having been picked
    by it.

    In the metric's own direction; None without two seeds, or where a seed of every configuration
    collapsed.
    """
    sign = 1.0 if maximize else -1.0
    scores = _Scores.of(runs, floor, sign)
    values = scores.cells.index.to_numpy()
    noise = scores.noise(values)
    among = scores.competing & scores.confirmed
    among = among if among.any() else scores.competing
    if not among.any():
        return None
    top = values[int(np.where(among, scores.means, -np.inf).argmax())]
    held = scores.held(among, noise.of(top), noise.df)
    return held and Held(held.estimate.scaled(sign), held.chosen, held.how)


def could_collapse(seeds: int) -> float:
    """Return the largest share of collapsing seeds that leaves `seeds` seeds without one in 5% of
    cases.
    """
    return 1 - ALPHA ** (1 / seeds)


def seeds_to_bound(share: float) -> int:
    """Return how many seeds without a collapse bound the share of collapsing seeds, with 95%."""
    return math.ceil(math.log(ALPHA) / math.log(1 - share))


def matched(cells: pd.DataFrame, chosen: pd.Series, others: Sequence[str]) -> pd.Series:
    """Which configurations have the chosen one's other settings; full fine-tuning has neither alpha
    nor targets.
    """
    same = pd.Series(True, index=cells.index)
    full = cells["full"].astype("boolean").fillna(False) | is_full(chosen)
    for key in others:
        equal = (cells[key] == chosen[key]).fillna(False).astype(bool) | (
            cells[key].isna() & pd.isna(chosen[key])
        )
        same &= equal | full if key in (ALPHA_KEY, TARGETS) else equal
    return same


def is_full(row: pd.Series) -> bool:
    """Whether a run trained all weights; False where its recipe could not be read."""
    return pd.notna(row["full"]) and bool(row["full"])


def _fair(
    column: str,
    cells: pd.DataFrame,
    means: NDArray[np.float64],
    chosen: pd.Series,
    others: Sequence[str],
) -> bool:
    """Whether a value had its chance beside the chosen one's other settings: at the same learning
    rate or its own best.

    Where a value has its own best rate its alpha is free as well, which does little but scale the
    rate.
    """
    if LR in others:
        beside = cells[
            _beside(column, cells, chosen, [key for key in others if key not in (LR, ALPHA_KEY)])
        ]
        rates, at = beside[LR].astype(float), means[cells.index.isin(beside.index)]
        if rates.nunique() > 2 and rates.min() < float(rates.to_numpy()[at.argmax()]) < rates.max():
            return True
    # Full fine-tuning's learning rates are not an adapter's.
    alike = (cells["full"].astype("boolean") == chosen["full"]).fillna(False)
    return bool((_beside(column, cells, chosen, others) & alike).any())


def _beside(
    column: str, cells: pd.DataFrame, chosen: pd.Series, others: Sequence[str]
) -> pd.Series:
    """Which configurations have the chosen one's other settings; target modules at equal rank or
    equal parameters.
    """
    same = matched(cells, chosen, others)
    if column == "targets" and RANK in others:
        equal = (cells["parameters"] / chosen["parameters"] - 1.0).abs() < EQUAL_SIZE
        same |= equal.fillna(False).astype(bool) & matched(
            cells, chosen, [key for key in others if key != RANK]
        )
    return same


def _reach(values: int, df: float) -> float:
    """How many standard errors the interval of each difference reaches, so that all hold together
    with 95%.
    """
    return float(qsturng(1 - ALPHA, values, df)) / math.sqrt(2)


def _standing(span: tuple[float, float] | None, margin: float) -> Standing:
    if span is None:
        return "open"
    low, high = span
    if low > 0 or high < 0:
        return "worse" if low > 0 else "better"
    return "tied" if -margin < low and high < margin else "open"


def _table(runs: pd.DataFrame, numbers: pd.Index) -> Floats:
    """Scores `[configurations, seeds]`, NaN where there is none; the last of a repeated seed."""
    rows = numbers.get_indexer(pd.Index(runs["configuration"]))
    seeds, columns = np.unique(runs["seed"].to_numpy(), return_inverse=True)
    table = np.full((len(numbers), len(seeds)), math.nan)
    # A configuration that was only confirmed has no row.
    table[rows[rows >= 0], columns[rows >= 0]] = runs["score"].to_numpy(float)[rows >= 0]
    return table


def _collapsed(scores: Floats, low: float) -> NDArray[np.int64]:
    """How many seeds of each configuration collapsed, `[configurations, seeds]` ->
    `[configurations]`.
    """
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
        count[cell] = int(
            (drop > max(COLLAPSE_SHARE * (best[cell] - low), COLLAPSE_SPREAD * spread)).sum()
        )
    return count
