"""The values of one setting against each other: each at its best among the other settings, free of that choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.labels import ALPHA as ALPHA_KEY
from analysis.labels import LR, RANK, TARGETS
from analysis.stats_seeds import confirmed, held_out
from analysis.stats_tests import ALPHA, Estimate

Standing = Literal["chosen", "worse", "as good", "open"]
# Seeds differ otherwise where training hardly works: chance is pooled over what keeps this share of the best gain.
COMPETING = 0.75
# A difference below this share of what training gained is no difference (as for the claims).
GAIN_SHARE = 0.1
# Adapters whose trained parameters differ by less than this share are of equal size.
EQUAL_SIZE = 0.05


@dataclass(frozen=True, slots=True)
class Level:
    """A value of a setting: the score of its best configuration, and how far the chosen value is ahead of it.

    `score` (None with one seed) and `mean` are in the metric's own direction; `ahead` is positive where the chosen one
    is better. "worse": told apart from the chosen; "as good": behind by less than the margin; "open": neither, or not
    `fair`: never tried as the chosen one was.
    """

    value: Any
    mean: float
    score: Estimate | None
    ahead: Estimate | None
    configurations: int
    seeds: int
    fair: bool
    standing: Standing


@dataclass(frozen=True, slots=True)
class Contest:
    """A setting's values, in order, one of them chosen; `margin` is the difference that would matter."""

    column: str
    chosen: Level
    levels: tuple[Level, ...]
    margin: float

    def of(self, *standings: Standing) -> list[Level]:
        """The levels that stand so."""
        return [level for level in self.levels if level.standing in standings]

    @property
    def certain(self) -> bool:
        """Whether each other value is told apart from the chosen one, or known to be as good."""
        return not self.of("open") and len(self.levels) > 1


def contest(
    runs: pd.DataFrame, column: str, winner: int, others: Sequence[str], floor: float | None, *, maximize: bool
) -> Contest | None:
    """The values of a column against that of the winning configuration; None where that was not run on all seeds.

    Best against runner-up by a two-sided test at 5%, which is all that having picked the best takes (Gutmann and Maymin
    1987). `others` are the other swept settings' columns: a value that was tried only with others than the winner's
    stays open, whatever it scored. `floor` is the base's score; the margin is a share of the gain.
    """
    sign = 1.0 if maximize else -1.0
    scores, cells, fresh = _scores(runs, column, sign)
    whole: NDArray[np.bool_] = np.asarray(np.isfinite(scores).all(axis=1))
    if winner not in cells.index or not whole[cells.index.get_loc(winner)]:
        return None
    means = np.where(whole, np.where(np.isfinite(scores), scores, 0.0).mean(axis=1), -np.inf)
    low = sign * floor if floor is not None else float(means[whole].min())
    gain = max(0.0, float(means.max()) - low)
    noise = _noise(scores[whole & (means >= low + COMPETING * gain)])
    chosen, levels = cells[cells.index == winner].iloc[0], []
    values = cells[column].to_numpy()
    first = _held(scores, values == chosen[column], means, fresh, noise)
    for value in sorted(pd.unique(values[whole])):
        mask = whole & (values == value)
        held = _held(scores, mask, means, fresh, noise)
        ahead = None
        if first is not None and held is not None and value != chosen[column]:
            # One pooled variance is behind both, so its degrees of freedom count once.
            ahead = Estimate(first.value - held.value, math.hypot(first.se, held.se), noise[1])
        fair = _fair(column, cells[mask], means[mask], chosen, others)
        stands = "chosen" if value == chosen[column] else _standing(ahead, GAIN_SHARE * gain) if fair else "open"
        score = None if held is None else held.scaled(sign)
        mean = sign * float(means[mask].max())
        levels.append(Level(value, mean, score, ahead, int(mask.sum()), scores.shape[1], fair, stands))
    return Contest(column, next(one for one in levels if one.standing == "chosen"), tuple(levels), GAIN_SHARE * gain)


def matched(cells: pd.DataFrame, chosen: pd.Series, others: Sequence[str]) -> pd.Series:
    """Which configurations have the chosen one's other settings; full fine-tuning has neither alpha nor targets."""
    same = pd.Series(True, index=cells.index)
    full = cells["full"].astype("boolean").fillna(False) | is_full(chosen)
    for key in others:
        equal = (cells[key] == chosen[key]).fillna(False).astype(bool) | (cells[key].isna() & pd.isna(chosen[key]))
        same &= equal | full if key in (ALPHA_KEY, TARGETS) else equal
    return same


def is_full(row: pd.Series) -> bool:
    """Whether a run trained all weights; False where its recipe could not be read."""
    return pd.notna(row["full"]) and bool(row["full"])


def _fair(
    column: str, cells: pd.DataFrame, means: NDArray[np.float64], chosen: pd.Series, others: Sequence[str]
) -> bool:
    """Whether a value had its chance beside the chosen one's other settings: at the same learning rate or its own best.

    Where a value has its own best rate its alpha is free as well, which does little but scale the rate.
    """
    if LR in others:
        beside = cells[_beside(column, cells, chosen, [key for key in others if key not in (LR, ALPHA_KEY)])]
        rates, at = beside[LR].astype(float), means[cells.index.isin(beside.index)]
        if rates.nunique() > 2 and rates.min() < float(rates.to_numpy()[at.argmax()]) < rates.max():
            return True
    # Full fine-tuning's learning rates are not an adapter's.
    alike = (cells["full"].astype("boolean") == chosen["full"]).fillna(False)
    return bool((_beside(column, cells, chosen, others) & alike).any())


def _beside(column: str, cells: pd.DataFrame, chosen: pd.Series, others: Sequence[str]) -> pd.Series:
    """Which configurations have the chosen one's other settings; target modules at equal rank or equal parameters."""
    same = matched(cells, chosen, others)
    if column == "targets" and RANK in others:
        equal = (cells["parameters"] / chosen["parameters"] - 1.0).abs() < EQUAL_SIZE
        same |= equal.fillna(False).astype(bool) & matched(cells, chosen, [key for key in others if key != RANK])
    return same


def _standing(ahead: Estimate | None, margin: float) -> Standing:
    if ahead is None:
        return "open"
    if ahead.below(margin) <= ALPHA:
        return "as good"
    return "worse" if ahead.above(0.0) <= ALPHA / 2 else "open"


def _scores(
    runs: pd.DataFrame, column: str, sign: float
) -> tuple[NDArray[np.float64], pd.DataFrame, dict[int, list[float]]]:
    """Scores `[configurations, seeds]`, a row of settings per configuration, and fresh seeds' scores by row number."""
    known = runs[runs[column].notna() & runs["configuration"].notna()]
    again = known["confirm"].astype(bool)
    table = known[~again].pivot_table(
        index="configuration", columns="seed", values="score", aggfunc="last", dropna=False
    )
    cells = known.drop_duplicates("configuration").set_index("configuration").reindex(table.index)
    rows = {number: place for place, number in enumerate(table.index)}
    fresh: dict[int, list[float]] = {}
    for number, score in known[again & known["score"].notna()][["configuration", "score"]].itertuples(index=False):
        fresh.setdefault(rows.get(number, -1), []).append(sign * float(score))
    return sign * table.to_numpy(float), cells, fresh


def _held(
    scores: NDArray[np.float64], mask: NDArray[np.bool_], means: NDArray[np.float64], fresh: dict[int, list[float]],
    noise: tuple[float, float],
) -> Estimate | None:  # fmt: skip
    """The best of some configurations' score, on fresh seeds or on held-out ones; None with one seed."""
    if not noise[1]:
        return None
    top = int(np.where(mask, means, -np.inf).argmax())
    eligible = mask & np.isfinite(means)
    held = confirmed(fresh.get(top, []), top, *noise) or held_out(scores, eligible, *noise)
    return None if held is None else held.estimate


def _noise(scores: NDArray[np.float64]) -> tuple[float, float]:
    """The variance of one score between seeds, pooled over configurations, and its degrees of freedom."""
    count, seeds = scores.shape
    if seeds < 2 or not count:
        return math.nan, 0.0
    return float(scores.var(axis=1, ddof=1).mean()), float(count * (seeds - 1))
