"""Statistics over seeds and held-out problems, as small functions of numbers and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.data.rows import param_columns
from harness.config.metrics import Direction
from harness.records.run_dir import Status

# A learning rate is good when it keeps this share of the best gain over the base.
GOOD_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Interval:
    """A range of scores, and what it is (`source`)."""

    low: float
    high: float
    source: str


@dataclass(frozen=True, slots=True)
class Best:
    """The winning configuration and the score that it won by: over fresh seeds where it was
    confirmed.

    `seeds` is how many that score rests on; `ties` have the same score; `leader` had the best mean
    in the sweep.
    """

    configuration: int
    score: float
    seeds: int
    candidates: int
    ties: tuple[int, ...]
    confirmed: bool
    leader: int


@dataclass(frozen=True, slots=True)
class Basin:
    """Learning rates tested, split by how much of the best gain over the base they kept.

    `good` runs from the lowest to the highest that kept `GOOD_SHARE` of it; empty when none rose
    above the base.
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
    return Interval(float(result.low), float(result.high), f"95% interval over {problems} problems")


def spread(scores: Sequence[float], problems: int | None) -> Interval | None:
    """The range of a configuration's seeds, or Wilson's interval over the held-out problems of a
    single one.

    `problems` is None for a score that is not a share of right answers; None comes back when there
    is no basis.
    """
    if len(scores) > 1:
        return Interval(min(scores), max(scores), f"range of {len(scores)} seeds")
    return wilson(scores[0], problems) if problems and len(scores) else None


def counts_right_answers(shares: Sequence[float], samples: int) -> bool:
    """Whether each share is a whole number of right answers out of `samples`, so that a binomial
    interval applies.
    """
    return all(
        abs(share * samples - round(share * samples)) < 0.01 and 0 <= share <= 1 for share in shares
    )


def complete(trials: pd.DataFrame, metric: str, *, confirm: bool = False) -> pd.DataFrame:
    """The trials that ran to their end and have a score: the only ones that count; the last of a
    repeated seed.

    `confirm`: those that ran a leading configuration again on fresh seeds; else those of the sweep.
    """
    done = trials[(trials["status"] == Status.COMPLETE.value) & trials[metric].notna()]
    if "confirm" in done.columns:
        done = done[done["confirm"].astype(bool) == confirm]
    elif confirm:
        done = done.iloc[:0]
    return done.sort_values("number").drop_duplicates(["configuration", "seed"], keep="last")


def fresh_seeds(trials: pd.DataFrame) -> set[int]:
    """The seeds on which leading configurations were run again."""
    if "confirm" not in trials.columns:
        return set()
    return {int(seed) for seed in trials.loc[trials["confirm"].astype(bool), "seed"].dropna()}


def by_configuration(
    trials: pd.DataFrame,
    metric: str,
    direction: Direction,
    seeds: Sequence[int],
    problems: int | None = None,
) -> pd.DataFrame:
    """One row per configuration, best first: mean, sd, min, max, spread (low, high), n of the seeds
    COMPLETE.

    `whole` marks those with all `seeds` COMPLETE; the others follow, unranked (`rank` is NA).
    `fresh` is the mean over fresh seeds, with the least and the largest, where two or more were run
    and all are COMPLETE; it ranks before the means of the sweep, and `score` is it or the mean.
    `last` is the mean of the last scores seen, whatever the status. Equal scores are ordered by
    configuration number and share a rank.
    """
    rows, again = [], fresh_seeds(trials)
    for number, group in trials.dropna(subset="configuration").groupby("configuration"):
        done, run_again = complete(group, metric), complete(group, metric, confirm=True)
        scores, fresh = ([float(score) for score in table[metric]] for table in (done, run_again))
        whole = bool(scores) and set(seeds) <= set(done["seed"])
        known = whole and len(again) > 1 and again == set(run_again["seed"])
        mean = float(np.mean(scores)) if scores else math.nan
        found = spread(scores, problems)
        rows.append(
            {
                "configuration": int(str(number)),
                **{key: group[key].iloc[0] for key in param_columns(trials)},
                "n": len(scores),
                "whole": whole,
                "mean": mean,
                "fresh": float(np.mean(fresh)) if known else math.nan,
                "fresh_min": min(fresh) if known else math.nan,
                "fresh_max": max(fresh) if known else math.nan,
                "score": float(np.mean(fresh)) if known else mean,
                "sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan,
                "min": min(scores, default=math.nan),
                "max": max(scores, default=math.nan),
                "low": found.low if found else math.nan,
                "high": found.high if found else math.nan,
                "source": found.source if found else None,
                "last": float(group[f"last/{metric}"].mean()),
                "statuses": ", ".join(
                    f"{n} {str(s).lower()}" for s, n in group["status"].value_counts().items()
                ),
            }
        )
    columns = [
        "configuration",
        *param_columns(trials),
        "n",
        "whole",
        "mean",
        "fresh",
        "fresh_min",
        "fresh_max",
    ]
    columns += ["score", "sd", "min", "max", "low", "high", "source", "last", "statuses"]
    table = pd.DataFrame(rows, columns=columns)
    table["whole"] = table["whole"].astype(bool)
    ascending = direction == "minimize"
    confirmed = table["fresh"].notna()
    ranks = (
        table["score"]
        .where(table["whole"])
        .groupby(confirmed)
        .rank(method="min", ascending=ascending)
    )
    table["rank"] = (ranks + int(confirmed.sum()) * ~confirmed).astype("Int64")
    return table.sort_values(
        ["whole", "rank", "mean", "configuration"],
        ascending=[False, True, ascending, True],
        ignore_index=True,
    )


def best_configuration(
    trials: pd.DataFrame, metric: str, direction: Direction, seeds: Sequence[int] | None = None
) -> Best | None:
    """The best configuration among those with all seeds COMPLETE; None when there is none.

    By the mean over fresh seeds where some were run again on them, else over the sweep's. `seeds`
    defaults to every seed of the sweep in the table.
    """
    wanted = (
        sorted(set(trials["seed"].dropna()) - fresh_seeds(trials)) if seeds is None else list(seeds)
    )
    ranked = by_configuration(trials, metric, direction, wanted)
    ranked = ranked[ranked["whole"]]
    if ranked.empty:
        return None
    first, confirmed = ranked.iloc[0], bool(pd.notna(ranked["fresh"].iloc[0]))
    ties = ranked[ranked["rank"] == first["rank"]]["configuration"].tolist()[1:]
    leader = ranked.sort_values("mean", ascending=direction == "minimize", kind="stable").iloc[0]
    led = first if first["mean"] == leader["mean"] else leader
    return Best(
        int(first["configuration"]),
        float(first["score"]),
        len(fresh_seeds(trials)) if confirmed else int(first["n"]),
        len(ranked),
        tuple(ties),
        confirmed,
        int(led["configuration"]),
    )


def basin(points: pd.DataFrame, floor: float, direction: Direction) -> Basin:
    """Split the learning rates of `points` (columns lr, score, finished) into too low, good and too
    high.

    `floor` is the base's score. A pruned trial (not finished) is evidence against its learning
    rate, never for it; a learning rate stands by its best point, so that a bad choice of another
    setting does not condemn it.
    """
    sign = 1.0 if direction == "maximize" else -1.0
    tested = tuple(sorted(float(lr) for lr in points["lr"].unique()))
    gains = (
        ((points["score"] - floor) * sign).where(points["finished"], -math.inf).fillna(-math.inf)
    )
    best_of = gains.groupby(points["lr"].astype(float)).max()
    if best_of.empty or best_of.max() <= 0:
        return Basin(None, tested, ())
    good = best_of[best_of >= GOOD_SHARE * best_of.max()].index
    between = tuple(lr for lr in tested if good.min() <= lr <= good.max())
    return Basin(float(str(best_of.idxmax())), tested, between)
