"""Build the table of runs: one row a run, each column of one type."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.data.columns import (
    IDENTITY,
    KEY,
    RUN_FLAGS,
    RUN_INTEGERS,
    RUN_NUMBERS,
    RUN_TEXTS,
    param_columns,
)
from analysis.data.facts import run_facts
from analysis.data.records import OTHER_INPUTS, THEN, Record, times_of
from harness.config import metrics
from harness.records.run_dir import Status

_ENDED = (Status.COMPLETE.value, Status.PRUNED.value, Status.FAILED.value)
# A table of trials names the sweep's metric M where the table of runs has general names.
_OF_METRIC = {
    "score": "{}",
    "base": "base/{}",
    "best": "best/{}",
    "last": "last/{}",
    "best_step": "best/step",
}


def run_row(record: Record, directory: Path, metric: str) -> dict[str, Any]:
    """Return a run's columns: identity, outcome, times, facts, swept keys and final metrics."""
    maximize = metrics.direction(metric) == "maximize"
    result = record.manifest.get("result") or {}
    logged = [(int(row["step"]), row[metric]) for row in record.rows if metric in row]
    trained = [(step, value) for step, value in logged if step > 0 and value == value]
    choose = max if maximize else min
    best_step, best = choose(trained, key=lambda point: point[1]) if trained else (None, None)
    last = trained[-1][1] if trained else None
    finals = (result.get("metrics") or {}) if record.status == Status.COMPLETE.value else {}
    if record.status == Status.COMPLETE.value and metric not in finals and trained:
        finals = {**finals, metric: last}
    steps = [int(row["step"]) for row in record.rows]
    stored_base = (result.get("base") or {}).get(metric)
    params: dict[str, Any] = record.trial.get("params") or {}
    others = {name: value for name, value in finals.items() if "/" in name and name != metric}
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
        "base": next((value for step, value in logged if step == 0), stored_base),
        "best": best,
        "best_step": best_step,
        "last": last,
        "problems": record.num_problems,
        "inputs": record.inputs,
        **run_facts(directory, record, metric, maximize),
        **{key: _scalar(value) for key, value in params.items()},
        **{name: _number(value) for name, value in others.items()},
    }


def with_costs(steps: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return steps with the episodes, model FLOPs and seconds that the run had used by then."""
    known = runs[[*KEY, "episodes_per_step", "flops_per_token"]]
    table = steps.merge(known, on=KEY, how="left")
    absent = pd.Series(float("nan"), index=table.index)
    table["episodes"] = table["step"] * table["episodes_per_step"].astype("Int64")
    tokens = table.get("num_tokens", absent).astype(float)
    table["flops"] = tokens * table["flops_per_token"].astype(float)
    evaluated = table.get("timing_s/eval", absent).fillna(0.0)
    spent = table.get("step_time", absent).fillna(0.0) + evaluated
    table["seconds"] = spent.groupby([table[name] for name in KEY]).cumsum()
    return table.drop(columns=["episodes_per_step", "flops_per_token"])


def with_totals(runs: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Return runs with their totals of episodes, FLOPs, tokens and update time, columns typed."""
    groups = steps.groupby(KEY)
    absent = pd.Series(float("nan"), index=steps.index)
    # The members of a pack update together, and each logs the whole time.
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
    types = {
        RUN_INTEGERS: "Int64",
        RUN_NUMBERS: "float64",
        RUN_TEXTS: "string",
        RUN_FLAGS: "boolean",
    }
    table = table.astype({name: kind for names, kind in types.items() for name in names})
    for name in param_columns(table):
        table[name] = one_type(table[name])
    return table.sort_values(["number", "run_dir"], ignore_index=True)


def on_one_input(runs: pd.DataFrame, seeds: Sequence[int]) -> pd.DataFrame:
    """Set runs apart that were trained on other inputs than the runs that are compared.

    Compared are the runs on the newest inputs for which a configuration has all `seeds` complete,
    else for which any run is. Other runs that have ended get the status `OTHER_INPUTS`; their
    reason says how they ended, and they have neither score nor base.
    """
    known = sorted(runs["inputs"].dropna().unique(), key=_newest, reverse=True)
    if len(known) < 2:
        return runs
    scored = runs[runs["score"].notna() & ~runs["confirm"].fillna(False)]
    parts = list(scored.groupby(["inputs", "configuration"]))
    whole = {str(part["inputs"].iloc[0]) for _, part in parts if set(seeds) <= set(part["seed"])}
    candidates = [
        name for group in (whole, set(scored["inputs"])) for name in known if name in group
    ]
    compared = (candidates or known)[0]
    apart = runs["inputs"].ne(compared).fillna(False) & runs["status"].isin(_ENDED)
    table = runs.copy()
    for place, run in runs[apart].iterrows():
        score = f" with {run['metric']} {run['score']:.4g}" if pd.notna(run["score"]) else ""
        reason = f": {run['reason']}" if pd.notna(run["reason"]) else ""
        text = f"{str(run['status']).lower()}{score} on inputs {run['inputs']}{reason}"
        table.loc[[place], "reason"] = text
    table.loc[apart, "status"] = OTHER_INPUTS
    table.loc[apart, ["score", "base", "last"]] = float("nan")
    table.loc[apart, "diverged"] = False
    return table


def _newest(inputs: str) -> tuple[int, int]:
    """Order inputs by their last; of equal ones, those of runs that began with them come last."""
    parts = inputs.split(THEN)
    return int(parts[-1]), -len(parts)


def as_trials(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a sweep's runs as a table of trials, with the outcome under the metric's own name.

    Columns: number, configuration, seed, status, confirm (a re-run on a fresh seed), reason,
    inputs, a column per swept recipe key, the last evaluation's metrics (NaN unless COMPLETE);
    `base/M`, `best/M`, `best/step` and `last/M` of the sweep's metric M whatever the status; step,
    seconds, run_dir.
    """
    named = runs.rename(columns={name: text.format(metric) for name, text in _OF_METRIC.items()})
    inputs = ["inputs"] if "inputs" in runs.columns else []
    finals = sorted(name for name in runs.columns if "/" in name)
    of_metric = [text.format(metric) for name, text in _OF_METRIC.items() if name != "score"]
    columns = [*IDENTITY, "reason", *inputs, *param_columns(runs), metric, *finals, *of_metric]
    return named[[*columns, "step", "seconds", "run_dir"]]


def one_type(column: pd.Series) -> pd.Series:
    """Return a swept key's column as numbers when all values are numbers, else as text."""
    values = column.dropna()
    if any(isinstance(value, str) for value in values):
        return column.map(str, na_action="ignore").astype("string")
    whole = all(isinstance(value, int) or float(value).is_integer() for value in values)
    return column.astype("Int64" if whole else float)


def _scalar(value: Any) -> Any:
    """Return a swept value as one scalar; lists can be neither grouped nor written as parquet."""
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return value if plain else json.dumps(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
