"""Statistics over seeds and held-out problems, as small functions of numbers and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.rows import param_columns
from harness.metrics import Direction
from harness.rundir import Status

# Below this many seeds a bootstrap over them is far too narrow to be called a 95% interval.
MIN_BOOTSTRAP_SEEDS = 5
# A learning rate is good when it keeps this share of the best gain over the base.
GOOD_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% interval and what its width accounts for (`source`)."""

    low: float
    high: float
    source: str

    def overlaps(self, other: Interval) -> bool:
        """Whether the two have a point in common."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, slots=True)
class Best:
    """The winning configuration: mean over its seeds, those tied with it, and how many it was chosen from."""

    configuration: int
    mean: float
    seeds: int
    candidates: int
    ties: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Basin:
    """Learning rates tested, split by how much of the best gain over the base they kept.

    `good` runs from the lowest to the highest that kept `GOOD_SHARE` of it; empty when none rose above the base.
    """

    best: float | None
    tested: tuple[float, ...]
    good: tuple[float, ...]

    @property
    def too_low(self) -> tuple[float, ...]:
        """Learning rates tested below the good ones."""
        return tuple(lr for lr in self.tested if self.good and lr < self.good[0])

    @property
    def too_high(self) -> tuple[float, ...]:
        """Learning rates tested above the good ones."""
        return tuple(lr for lr in self.tested if self.good and lr > self.good[-1])


def wilson(share: float, problems: int) -> Interval:
    """Wilson's 95% interval of a share of right answers out of `problems` (Wilson 1927)."""
    result = stats.binomtest(round(share * problems), problems).proportion_ci(0.95, method="wilson")
    return Interval(float(result.low), float(result.high), f"{problems} problems")


def bootstrap(scores: Sequence[float]) -> Interval:
    """95% percentile bootstrap interval of the mean over seeds; the same scores give the same interval."""
    if len(set(scores)) == 1:
        return Interval(scores[0], scores[0], f"{len(scores)} seeds")
    result = stats.bootstrap((np.asarray(scores),), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = result.confidence_interval
    return Interval(float(low), float(high), f"{len(scores)} seeds")


def interval(scores: Sequence[float], problems: int | None) -> Interval | None:
    """The interval of a mean over seeds: over the seeds when there are enough of them, else over the problems.

    All seeds answer the same problems, so several seeds count as one draw of problems: wide rather than too narrow.
    `problems` is None for a score that is not a share of right answers; None comes back when there is no basis.
    """
    if len(scores) >= MIN_BOOTSTRAP_SEEDS:
        return bootstrap(scores)
    return wilson(float(np.mean(scores)), problems) if problems and len(scores) else None


def counts_right_answers(shares: Sequence[float], samples: int) -> bool:
    """Whether each share is a whole number of right answers out of `samples`, so that a binomial interval applies."""
    return all(abs(share * samples - round(share * samples)) < 0.01 and 0 <= share <= 1 for share in shares)


def complete(trials: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The trials that ran to their end and have a score: the only ones that count; the last of a repeated seed.

    Those that confirm a leading configuration on fresh seeds are no part of the ranking that chose it.
    """
    done = trials[(trials["status"] == Status.COMPLETE.value) & trials[metric].notna()]
    if "confirm" in done.columns:
        done = done[~done["confirm"].astype(bool)]
    return done.sort_values("number").drop_duplicates(["configuration", "seed"], keep="last")


def by_configuration(
    trials: pd.DataFrame, metric: str, direction: Direction, seeds: Sequence[int], problems: int | None = None
) -> pd.DataFrame:
    """One row per configuration, best first: mean, sd, min, max, interval (low, high), n of the seeds COMPLETE.

    `whole` marks those with all `seeds` COMPLETE; the others follow, unranked (`rank` is NA). `last` is the mean of the
    last scores seen, whatever the status. Equal means are ordered by configuration number and share a rank.
    """
    rows = []
    for number, group in trials.dropna(subset="configuration").groupby("configuration"):
        done = complete(group, metric)
        scores = [float(score) for score in done[metric]]
        found = interval(scores, problems)
        rows.append(
            {
                "configuration": int(str(number)),
                **{key: group[key].iloc[0] for key in param_columns(trials)},
                "n": len(scores),
                "whole": bool(scores) and set(seeds) <= set(done["seed"]),
                "mean": float(np.mean(scores)) if scores else math.nan,
                "sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan,
                "min": min(scores, default=math.nan),
                "max": max(scores, default=math.nan),
                "low": found.low if found else math.nan,
                "high": found.high if found else math.nan,
                "source": found.source if found else None,
                "last": float(group[f"last/{metric}"].mean()),
                "statuses": ", ".join(f"{n} {str(s).lower()}" for s, n in group["status"].value_counts().items()),
            }
        )
    columns = ["configuration", *param_columns(trials), "n", "whole", "mean", "sd", "min", "max", "low", "high"]
    table = pd.DataFrame(rows, columns=[*columns, "source", "last", "statuses"])
    table["whole"] = table["whole"].astype(bool)
    ascending = direction == "minimize"
    table["rank"] = table["mean"].where(table["whole"]).rank(method="min", ascending=ascending).astype("Int64")
    order = ["whole", "mean", "configuration"]
    return table.sort_values(order, ascending=[False, ascending, True], ignore_index=True)


def best_configuration(
    trials: pd.DataFrame, metric: str, direction: Direction, seeds: Sequence[int] | None = None
) -> Best | None:
    """The configuration with the best mean over seeds, among those with all seeds COMPLETE; None when there is none.

    `seeds` defaults to every seed in the table.
    """
    wanted = sorted(set(trials["seed"].dropna())) if seeds is None else list(seeds)
    ranked = by_configuration(trials, metric, direction, wanted)
    ranked = ranked[ranked["whole"]]
    if ranked.empty:
        return None
    first = ranked.iloc[0]
    ties = ranked[ranked["mean"] == first["mean"]]["configuration"].tolist()[1:]
    return Best(int(first["configuration"]), float(first["mean"]), int(first["n"]), len(ranked), tuple(ties))


def basin(points: pd.DataFrame, floor: float, direction: Direction) -> Basin:
    """Split the learning rates of `points` (columns lr, score, finished) into too low, good and too high.

    `floor` is the base's score. A pruned trial (not finished) is evidence against its learning rate, never for it;
    a learning rate stands by its best point, so that a bad choice of another setting does not condemn it.
    """
    sign = 1.0 if direction == "maximize" else -1.0
    tested = tuple(sorted(float(lr) for lr in points["lr"].unique()))
    gains = ((points["score"] - floor) * sign).where(points["finished"], -math.inf).fillna(-math.inf)
    best_of = gains.groupby(points["lr"].astype(float)).max()
    if best_of.empty or best_of.max() <= 0:
        return Basin(None, tested, ())
    good = best_of[best_of >= GOOD_SHARE * best_of.max()].index
    between = tuple(lr for lr in tested if good.min() <= lr <= good.max())
    return Basin(float(str(best_of.idxmax())), tested, between)
