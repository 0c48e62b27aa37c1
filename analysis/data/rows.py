"""One run as one row: what became of it, what it cost and what it was, each column of one type."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.data.facts import facts
from analysis.data.records import OTHER_INPUTS, THEN, Record, times_of
from analysis.data.sources import problems_of
from harness.config import metrics
from harness.records.run_dir import Status

KEY = ["directory", "run_dir"]
_ENDED = (Status.COMPLETE.value, Status.PRUNED.value, Status.FAILED.value)
IDENTITY = ("number", "configuration", "seed", "status", "confirm")
WHOLE = (
    "number",
    "configuration",
    "seed",
    "step",
    "rank",
    "batch_size",
    "parameters",
    "model_parameters",
    "episodes",
    "hidden_size",
    "best_step",
    "problems",
)
REAL = (
    "score",
    "base",
    "best",
    "last",
    "seconds",
    "alpha",
    "lr",
    "rule_lr",
    "tokens",
    "flops",
    "update_seconds",
    "created",
    "started",
    "ended",
)
WORDS = (
    "run_dir",
    "status",
    "reason",
    "targets",
    "budget",
    "model",
    "model_type",
    "context",
    "metric",
    "source",
    "command",
    "inputs",
)
FLAGS = ("full", "confirm", "diverged", "maximize")
# What every table of runs has, besides its directory, swept keys and final metrics; and of steps.
COLUMNS = (*WHOLE, *REAL, *WORDS, *FLAGS)
COSTS = ("episodes", "flops", "seconds")
# A table of runs and one of trials call the sweep's metric M differently.
_OF_METRIC = {
    "score": "{}",
    "base": "base/{}",
    "best": "best/{}",
    "last": "last/{}",
    "best_step": "best/step",
}


def run_row(record: Record, directory: Path, metric: str) -> dict[str, Any]:
    """A run's columns: identity, outcome in the metric, times, facts, swept recipe keys and other
    final metrics.
    """
    maximize = metrics.direction(metric) == "maximize"
    result = record.manifest.get("result") or {}
    logged = [(int(row["step"]), row[metric]) for row in record.rows if metric in row]
    trained = [(step, value) for step, value in logged if step > 0 and value == value]
    choose = max if maximize else min
    best = choose(trained, key=lambda point: point[1]) if trained else (None, None)
    finals = (result.get("metrics") or {}) if record.status == Status.COMPLETE.value else {}
    if record.status == Status.COMPLETE.value and metric not in finals and trained:
        finals = {**finals, metric: trained[-1][1]}
    steps = [int(row["step"]) for row in record.rows]
    return {
        **record.identity(),
        "reason": record.reason,
        "run_dir": record.run_dir,
        "step": max(steps) if steps else result.get("step"),
        "seconds": record.seconds,
        **times_of(record.manifest),
        "metric": metric,
        "maximize": maximize,
        "score": _number(finals.get(metric)),
        "base": next(
            (value for step, value in logged if step == 0), (result.get("base") or {}).get(metric)
        ),
        "best": best[1],
        "best_step": best[0],
        "last": trained[-1][1] if trained else None,
        "problems": problems_of(record),
        "inputs": record.inputs,
        **facts(directory, record, metric, maximize),
        **{key: cell(value) for key, value in record.params.items()},
        **{
            name: _number(value) for name, value in finals.items() if "/" in name and name != metric
        },
    }


def with_costs(steps: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Steps with the episodes, model FLOPs and seconds that the run had used by then."""
    known = runs[[*KEY, "episodes_per_step", "flops_per_token"]]
    table = steps.merge(known, on=KEY, how="left")
    absent = pd.Series(float("nan"), index=table.index)
    table["episodes"] = table["step"] * table["episodes_per_step"].astype("Int64")
    table["flops"] = table.get("num_tokens", absent).astype(float) * table[
        "flops_per_token"
    ].astype(float)
    spent = table.get("step_time", absent).fillna(0.0) + table.get("timing_s/eval", absent).fillna(
        0.0
    )
    table["seconds"] = spent.groupby([table[name] for name in KEY]).cumsum()
    return table.drop(columns=["episodes_per_step", "flops_per_token"])


def with_totals(runs: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Runs with what they used in all, each column of one type."""
    groups = steps.groupby(KEY)
    absent = pd.Series(float("nan"), index=steps.index)
    # A pack's members update together, and each logs the whole time.
    shared = steps.get("timing_s/update", absent) / steps.get("perf/members", absent).fillna(1.0)
    totals = pd.DataFrame(
        {
            "episodes": groups["episodes"].max(),
            "flops": groups["flops"].max(),
            "tokens": groups["num_tokens"].max() if "num_tokens" in steps.columns else float("nan"),
            "update_seconds": shared.groupby([steps[name] for name in KEY]).sum(min_count=1),
        }
    )
    table = runs.merge(totals, left_on=KEY, right_index=True, how="left")
    table = table.drop(columns=["episodes_per_step", "flops_per_token"])
    kinds = ((WHOLE, "Int64"), (REAL, "float64"), (WORDS, "string"), (FLAGS, "boolean"))
    table = table.astype({name: kind for names, kind in kinds for name in names})
    for name in param_columns(table):
        table[name] = one_type(table[name])
    return table.sort_values(["number", "run_dir"], ignore_index=True)


def on_one_input(runs: pd.DataFrame, seeds: Sequence[int]) -> pd.DataFrame:
    """Runs with those set apart that were trained on other inputs than the runs that are compared.

    Compared are the runs on the newest inputs of which a configuration has all `seeds` complete, or
    else any run. The others that have ended get the status `OTHER_INPUTS`, say in their reason how
    they ended, and have neither score nor base.
    """
    known = sorted(runs["inputs"].dropna().unique(), key=_newest, reverse=True)
    if len(known) < 2:
        return runs
    counted = runs[runs["score"].notna() & ~runs["confirm"].fillna(False)]
    parts = list(counted.groupby(["inputs", "configuration"]))
    whole = {str(part["inputs"].iloc[0]) for _, part in parts if set(seeds) <= set(part["seed"])}
    chosen = next(
        (one for group in (whole, set(counted["inputs"])) for one in known if one in group),
        known[0],
    )
    apart = runs["inputs"].ne(chosen).fillna(False) & runs["status"].isin(_ENDED)
    table = runs.copy()
    for row in runs.index[apart]:
        status, score, why = (runs.loc[row, name] for name in ("status", "score", "reason"))
        how = f" with {runs.loc[row, 'metric']} {score:.4g}" if pd.notna(score) else ""
        more = f": {why}" if pd.notna(why) else ""
        table.loc[row, "reason"] = (
            f"{str(status).lower()}{how} on inputs {runs.loc[row, 'inputs']}{more}"
        )
    table.loc[apart, "status"] = OTHER_INPUTS
    table.loc[apart, ["score", "base", "last"]] = float("nan")
    table.loc[apart, "diverged"] = False
    return table


def _newest(inputs: str) -> tuple[int, int]:
    """What inputs are ordered by: the last of them; those alone come after those that followed
    others.
    """
    parts = inputs.split(THEN)
    return int(parts[-1]), -len(parts)


def as_trials(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A sweep's rows of `Tables.runs` as a table of its trials: the outcome under the metric's own
    name.

    Columns: number, configuration, seed, status, confirm (a re-run on a fresh seed), reason,
    inputs, a column per swept recipe key, the last evaluation's metrics (NaN unless COMPLETE),
    `base/M`, `best/M`, `best/step` and `last/M` of the sweep's metric M whatever the status, step,
    seconds, run_dir.
    """
    named = runs.rename(columns={name: text.format(metric) for name, text in _OF_METRIC.items()})
    others = sorted(name for name in runs.columns if "/" in name)
    mark = ["inputs"] if "inputs" in runs.columns else []
    lead = [*IDENTITY, "reason", *mark, *param_columns(runs), metric, *others]
    return named[
        [
            *lead,
            *(f"{part}/{metric}" for part in ("base", "best", "last")),
            "best/step",
            "step",
            "seconds",
            "run_dir",
        ]
    ]


def param_columns(trials: pd.DataFrame) -> list[str]:
    """The columns of a table of trials that are swept recipe keys: dotted, where a metric's name
    has slashes.
    """
    return [name for name in trials.columns if "." in name and "/" not in name]


def cell(value: Any) -> Any:
    """A parameter as one scalar: a column of lists can be neither grouped nor written to
    parquet.
    """
    return (
        value
        if isinstance(value, str | int | float) and not isinstance(value, bool)
        else json.dumps(value)
    )


def one_type(column: pd.Series) -> pd.Series:
    """A parameter's column as numbers when every value is one, else as text: a mixed column cannot
    be written.
    """
    given = column.dropna()
    if any(isinstance(value, str) for value in given):
        return column.map(str, na_action="ignore").astype("string")
    whole = all(isinstance(value, int) or float(value).is_integer() for value in given)
    return column.astype("Int64" if whole else float)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
