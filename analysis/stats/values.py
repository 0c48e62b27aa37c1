"""Compare the values of one setting, each at its best configuration, all pairs tested together."""

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
from analysis.stats.effects import ALPHA, GAIN_SHARE, POWER, Estimate
from analysis.stats.scores import Mask, SweepScores
from analysis.stats.selection import Held

Standing = Literal["chosen", "worse", "tied", "better", "unstable", "open"]
# Adapters whose trained parameters differ by less than this share are of equal size.
EQUAL_SIZE = 0.05


@dataclass(frozen=True, slots=True)
class ComparedValue:
    """A value of a setting, by the score of its best configuration.

    `mean` and `score` are as the metric counts; `score` is corrected for selection bias, None with
    one seed. `ahead` is how far the chosen value is ahead, `interval` its simultaneous 95%
    interval. `seeds` are behind the score; `collapsed` of the best configuration's `tried` seeds,
    fresh ones included, collapsed. `fair`: it was tried beside the chosen value's other settings.
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
class ValueComparison:
    """A setting's values in order, one of them chosen.

    `margin` is the difference that would matter; `judged` counts the values tested against each
    other.
    """

    column: str
    chosen: ComparedValue
    values: tuple[ComparedValue, ...]
    margin: float
    judged: int

    def of(self, *standings: Standing) -> list[ComparedValue]:
        """Return the values with one of these standings."""
        return [value for value in self.values if value.standing in standings]

    @property
    def others(self) -> list[ComparedValue]:
        """All values but the chosen one."""
        return [value for value in self.values if value.standing != "chosen"]

    @property
    def verdict(self) -> Literal["best", "tied", "open"]:
        """`best`: every other value is worse; `tied`: every other is worse or tied; else `open`."""
        if not self.others or self.chosen.collapsed or self.of("better", "unstable", "open"):
            return "open"
        return "tied" if self.of("tied") else "best"

    def seeds_needed(self, value: ComparedValue, most: int) -> int | None:
        """Return how many seeds tell a value apart, or tied, with a power of 80%.

        None above `most`, or where chance is not known.
        """
        if value.ahead is None or not value.ahead.se:
            return None
        gap = abs(value.ahead.value)
        target = max(gap, self.margin - gap)
        for seeds in range(value.seeds + 1, most + 1):
            df = value.ahead.df * (seeds - 1) / (value.seeds - 1)
            se = value.ahead.se * math.sqrt(value.seeds / seeds)
            if (_reach(self.judged, df) + float(ndtri(POWER))) * se < target:
                return seeds
        return None


def compare_values(
    runs: pd.DataFrame,
    column: str,
    winner: int,
    others: Sequence[str],
    floor: float | None,
    *,
    maximize: bool,
) -> ValueComparison | None:
    """Compare the values of a column with that of the winning configuration.

    Intervals of all differences hold together with 95% (Tukey 1949, Kramer 1956), so that at most
    5% of sweeps call a value worse that is not. `others` are the columns of the other swept
    settings: a value that was never tried beside the winner's stays open, whatever it scored.
    `floor` is the base's score; the margin is a share of the gain over it. None where the winner
    has no score.
    """
    sign = 1.0 if maximize else -1.0
    scores = SweepScores.of(runs[runs[column].notna()], floor, sign)
    cells = scores.cells
    if winner not in cells.index or not scores.whole[cells.index.get_loc(winner)]:
        return None
    chosen, columns = cells[cells.index == winner].iloc[0], cells[column].to_numpy()
    noise = scores.noise(columns)
    candidates: dict[Any, tuple[Mask, Held | None, bool]] = {}
    for value in sorted(pd.unique(columns[scores.whole])):
        mask = scores.whole & (columns == value)
        alike = value == chosen[column] or column == "configuration"
        fair = alike or _fair(column, cells[mask], scores.means[mask], chosen, others)
        # The score of a configuration with a collapsed seed is luck, so it is left out.
        candidates[value] = mask, scores.held(mask & scores.stable, noise.of(value), noise.df), fair
    judged = sum(held is not None and fair for _, held, fair in candidates.values())
    reach = _reach(judged, noise.df) if judged > 1 else math.inf
    margin, first, values = GAIN_SHARE * scores.gain, candidates[chosen[column]][1], []
    for value, (mask, held, fair) in candidates.items():
        top = scores.top(mask)
        collapsed = 0 if (mask & scores.stable).any() else int(scores.collapsed[top])
        is_chosen, ahead, interval = value == chosen[column], None, None
        if first is not None and held is not None and not is_chosen:
            gap = first.estimate.value - held.estimate.value
            ahead = Estimate(gap, math.hypot(first.estimate.se, held.estimate.se), noise.df)
            # Seeds that did not differ at all leave no measure of chance.
            interval = (gap - reach * ahead.se, gap + reach * ahead.se) if ahead.se else None
        standing: Standing = "chosen"
        if not is_chosen:
            standing = "unstable" if collapsed else _standing(interval, margin) if fair else "open"
        values.append(
            ComparedValue(
                value=value,
                mean=sign * float(scores.means[top]),
                score=None if held is None else held.estimate.scaled(sign),
                ahead=ahead,
                interval=interval,
                configurations=int(mask.sum()),
                seeds=len(held.chosen) if held else scores.swept.shape[1],
                collapsed=collapsed,
                tried=int(np.isfinite([*scores.swept[top], *scores.fresh[top]]).sum()),
                fair=fair,
                standing=standing,
            )
        )
    best = next(value for value in values if value.standing == "chosen")
    return ValueComparison(column, best, tuple(values), margin, judged)


def matched(cells: pd.DataFrame, chosen: pd.Series, others: Sequence[str]) -> pd.Series:
    """Return which configurations have the chosen one's other settings.

    Full fine-tuning has neither alpha nor target modules, so it matches any.
    """
    same = pd.Series(True, index=cells.index)
    full = cells["full"].astype("boolean").fillna(False) | is_full(chosen)
    for key in others:
        equal = (cells[key] == chosen[key]).fillna(False).astype(bool)
        equal |= cells[key].isna() & pd.isna(chosen[key])
        same &= equal | full if key in (ALPHA_KEY, TARGETS) else equal
    return same


def is_full(row: pd.Series) -> bool:
    """Return whether a run trained all weights; False where its recipe could not be read."""
    return pd.notna(row["full"]) and bool(row["full"])


def _fair(
    column: str,
    cells: pd.DataFrame,
    means: NDArray[np.float64],
    chosen: pd.Series,
    others: Sequence[str],
) -> bool:
    """Return whether a value was tried beside the chosen one's other settings.

    Either at the chosen learning rate, or over rates with its own best among them. In that case
    alpha may differ as well, as it does little but scale the rate.
    """
    if LR in others:
        without = [key for key in others if key not in (LR, ALPHA_KEY)]
        beside = cells[_beside(column, cells, chosen, without)]
        rates, at = beside[LR].astype(float), means[cells.index.isin(beside.index)]
        if rates.nunique() > 2 and rates.min() < float(rates.to_numpy()[at.argmax()]) < rates.max():
            return True
    # Full fine-tuning's learning rates are not an adapter's.
    alike = (cells["full"].astype("boolean") == chosen["full"]).fillna(False)
    return bool((_beside(column, cells, chosen, others) & alike).any())


def _beside(
    column: str, cells: pd.DataFrame, chosen: pd.Series, others: Sequence[str]
) -> pd.Series:
    """Return which configurations have the chosen one's other settings.

    Target modules are compared at equal rank or equal parameters.
    """
    same = matched(cells, chosen, others)
    if column == "targets" and RANK in others:
        equal = (cells["parameters"] / chosen["parameters"] - 1.0).abs() < EQUAL_SIZE
        without = [key for key in others if key != RANK]
        same |= equal.fillna(False).astype(bool) & matched(cells, chosen, without)
    return same


def _reach(values: int, df: float) -> float:
    """Return the standard errors that the simultaneous 95% interval of a difference reaches."""
    return float(qsturng(1 - ALPHA, values, df)) / math.sqrt(2)


def _standing(interval: tuple[float, float] | None, margin: float) -> Standing:
    if interval is None:
        return "open"
    low, high = interval
    if low > 0 or high < 0:
        return "worse" if low > 0 else "better"
    return "tied" if -margin < low and high < margin else "open"
