"""Rank the configurations of a sweep by their scores over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from analysis.data.columns import param_columns
from harness.config.metrics import Direction
from harness.records.run_dir import Status


@dataclass(frozen=True, slots=True)
class Interval:
    """A range of scores; `source` says in words what it is."""

    low: float
    high: float
    source: str


@dataclass(frozen=True, slots=True)
class Winner:
    """The best configuration and its score, which is over fresh seeds where it was `confirmed`.

    `seeds` counts the seeds behind the score, `candidates` the configurations with all seeds.
    `ties` have the same score. `leader` had the best mean over the sweep's own seeds.
    """

    configuration: int
    score: float
    seeds: int
    candidates: int
    ties: tuple[int, ...]
    confirmed: bool
    leader: int


def wilson(share: float, problems: int) -> Interval:
    """Return Wilson's 95% interval of a share of right answers (Wilson 1927)."""
    result = stats.binomtest(round(share * problems), problems).proportion_ci(0.95, method="wilson")
    return Interval(float(result.low), float(result.high), f"95% interval over {problems} problems")


def spread(scores: Sequence[float], problems: int | None) -> Interval | None:
    """Return the range of several seeds, or Wilson's interval over the problems of a single one.

    `problems` is None for a score that is not a share of right answers. None without either basis.
    """
    if len(scores) > 1:
        return Interval(min(scores), max(scores), f"range of {len(scores)} seeds")
    return wilson(scores[0], problems) if problems and len(scores) else None


def counts_right_answers(shares: Sequence[float], samples: int) -> bool:
    """Return whether each share is a whole number of right answers out of `samples`."""
    counts = [share * samples for share in shares]
    return all(abs(count - round(count)) < 0.01 and 0 <= count <= samples for count in counts)


def complete(trials: pd.DataFrame, metric: str, *, confirm: bool = False) -> pd.DataFrame:
    """Return the trials that completed with a score; of a repeated seed the last.

    `confirm` selects the re-runs of leading configurations on fresh seeds, else the sweep's trials.
    """
    done = trials[(trials["status"] == Status.COMPLETE.value) & trials[metric].notna()]
    if "confirm" in done.columns:
        done = done[done["confirm"].astype(bool) == confirm]
    elif confirm:
        done = done.iloc[:0]
    return done.sort_values("number").drop_duplicates(["configuration", "seed"], keep="last")


def fresh_seeds(trials: pd.DataFrame) -> set[int]:
    """Return the seeds on which leading configurations were run again."""
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
    """Return one row per configuration, best first: mean, min, max, low, high, n of COMPLETE seeds.

    `whole` marks configurations with all `seeds` COMPLETE; the others follow without a `rank`.
    `fresh` is the mean over fresh seeds, with `fresh_min` and `fresh_max`, where there are two or
    more and all are COMPLETE; these rank before all others. `score` is `fresh`, else the mean.
    `last` is the mean of the last scores seen, whatever the status. Configurations with equal
    scores share a rank and are ordered by number.
    """
    rows, again = [], fresh_seeds(trials)
    for number, group in trials.dropna(subset="configuration").groupby("configuration"):
        done, run_again = complete(group, metric), complete(group, metric, confirm=True)
        scores, fresh = ([float(score) for score in table[metric]] for table in (done, run_again))
        whole = bool(scores) and set(seeds) <= set(done["seed"])
        known = whole and len(again) > 1 and again == set(run_again["seed"])
        mean = float(np.mean(scores)) if scores else math.nan
        interval = spread(scores, problems) or Interval(math.nan, math.nan, "")
        counts = group["status"].value_counts().items()
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
                "min": min(scores, default=math.nan),
                "max": max(scores, default=math.nan),
                "low": interval.low,
                "high": interval.high,
                "source": interval.source or None,
                "last": float(group[f"last/{metric}"].mean()),
                "statuses": ", ".join(f"{count} {str(status).lower()}" for status, count in counts),
            }
        )
    names = "n whole mean fresh fresh_min fresh_max score min max low high source last statuses"
    columns = ["configuration", *param_columns(trials), *names.split()]
    table = pd.DataFrame(rows, columns=columns).astype({"whole": bool})
    ascending = direction == "minimize"
    confirmed = table["fresh"].notna()
    ranked = table["score"].where(table["whole"]).groupby(confirmed)
    ranks = ranked.rank(method="min", ascending=ascending)
    table["rank"] = (ranks + int(confirmed.sum()) * ~confirmed).astype("Int64")
    return table.sort_values(
        ["whole", "rank", "mean", "configuration"],
        ascending=[False, True, ascending, True],
        ignore_index=True,
    )


def best_configuration(
    trials: pd.DataFrame, metric: str, direction: Direction, seeds: Sequence[int] | None = None
) -> Winner | None:
    """Return the best configuration of those with all seeds COMPLETE; None when there is none.

    Fresh seeds decide where leading configurations were run again on them, else the sweep's seeds.
    `seeds` defaults to every seed of the sweep in the table.
    """
    if seeds is None:
        seeds = sorted(set(trials["seed"].dropna()) - fresh_seeds(trials))
    ranked = by_configuration(trials, metric, direction, seeds)
    ranked = ranked[ranked["whole"]]
    if ranked.empty:
        return None
    first = ranked.iloc[0]
    confirmed = bool(pd.notna(first["fresh"]))
    ties = ranked[ranked["rank"] == first["rank"]]["configuration"].tolist()[1:]
    leader = ranked.sort_values("mean", ascending=direction == "minimize", kind="stable").iloc[0]
    return Winner(
        configuration=int(first["configuration"]),
        score=float(first["score"]),
        seeds=len(fresh_seeds(trials)) if confirmed else int(first["n"]),
        candidates=len(ranked),
        ties=tuple(ties),
        confirmed=confirmed,
        leader=int((first if first["mean"] == leader["mean"] else leader)["configuration"]),
    )
