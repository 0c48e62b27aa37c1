"""Run and sweep directories as tidy pandas tables. Facts come from the files' contents, never from names."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.facts import facts
from analysis.records import Record, check_own, read_recipe, read_record, read_records
from harness import metrics
from harness.errors import UserError
from harness.paths import shown
from harness.rundir import RunDir, Status, write_bytes

DEFAULT_METRIC = "eval/accuracy"
_IDENTITY = ("number", "configuration", "seed", "status", "confirm")


@dataclass(frozen=True, slots=True)
class Tables:
    """Any number of runs and sweeps as three tidy tables; a run is (`directory`, `run_dir`) in each.

    `runs`: a row per run, whatever became of it. `steps`: a row per run and logged step. `samples`: a row per kept
    completion (step, phase, index, reward, …).
    """

    runs: pd.DataFrame
    steps: pd.DataFrame
    samples: pd.DataFrame

    def write(self, folder: str | Path) -> None:
        """Write the tables as parquet files, each whole or not at all: with these alone a report can be redrawn."""
        for part in fields(self):
            buffer = io.BytesIO()
            getattr(self, part.name).to_parquet(buffer, index=False)
            write_bytes(Path(folder) / f"{part.name}.parquet", buffer.getvalue())

    @classmethod
    def read(cls, folder: str | Path) -> Tables:
        """Read what `write` wrote; raises UserError when a table is missing or damaged."""
        found = {}
        for part in fields(cls):
            file = Path(folder) / f"{part.name}.parquet"
            try:
                found[part.name] = pd.read_parquet(file)
            except (OSError, ValueError) as error:
                raise UserError("a table cannot be read", got=f"{file}: {error}") from None
        return cls(**found)


def load(directories: Iterable[str | Path]) -> Tables:
    """The tables of any number of run and sweep directories; raises UserError for one that is neither.

    Columns of `runs`: `directory`, those of `load_trials` for what every run has, `metric`, `maximize`, `score` (NaN
    unless COMPLETE), `last`, `best`, `base`, `tokens`, `flops`, `episodes`, `update_seconds`, `facts.facts`', and one
    per swept recipe key of any sweep.
    """
    places = list(dict.fromkeys(Path(directory).resolve() for directory in directories))
    steps = pd.concat([load_steps(place).assign(directory=shown(place)) for place in places], ignore_index=True)
    runs = pd.concat([_runs(place) for place in places], ignore_index=True)
    steps = _with_costs(steps, runs)
    samples = pd.concat([load_samples(place).assign(directory=shown(place)) for place in places], ignore_index=True)
    for name in ("number", "configuration", "seed"):
        samples[name] = samples[name].astype("Int64") if name in samples.columns else pd.Series(dtype="Int64")
    return Tables(_with_totals(runs, steps), steps, samples)


_KEY = ["directory", "run_dir"]
_WHOLE = ("number", "configuration", "seed", "step", "rank", "batch_size", "parameters", "model_parameters", "episodes")
_REAL = ("score", "base", "best", "last", "seconds", "alpha", "lr", "rule_lr", "tokens", "flops", "update_seconds")
_WORDS = ("status", "reason", "targets", "budget", "model", "model_type", "context", "metric", "source")


def _runs(directory: Path) -> pd.DataFrame:
    metric = metric_of(directory)
    maximize = metrics.direction(metric) == "maximize"
    rows = []
    for record in read_records(directory):
        row = _trial_row(record, metric)
        rows.append(
            {
                "directory": shown(directory),
                **{name: row[name] for name in (*_IDENTITY, "reason", "run_dir", "step", "seconds")},
                "metric": metric,
                "maximize": maximize,
                "score": row.get(metric),
                **{part: row[f"{part}/{metric}"] for part in ("base", "best", "last")},
                **facts(directory, record, metric, maximize),
                **{key: _cell(value) for key, value in record.params.items()},
            }
        )
    return pd.DataFrame(rows)


def _with_costs(steps: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Steps with the episodes, model FLOPs and seconds that the run had used by then."""
    if runs.empty:
        return steps
    known = runs[[*_KEY, "episodes_per_step", "flops_per_token"]]
    table = steps.merge(known, on=_KEY, how="left")
    absent = pd.Series(float("nan"), index=table.index)
    table["episodes"] = table["step"] * table["episodes_per_step"].astype("Int64")
    table["flops"] = table.get("num_tokens", absent).astype(float) * table["flops_per_token"].astype(float)
    spent = table.get("step_time", absent).fillna(0.0) + table.get("timing_s/eval", absent).fillna(0.0)
    table["seconds"] = spent.groupby([table[name] for name in _KEY]).cumsum()
    return table.drop(columns=["episodes_per_step", "flops_per_token"])


def _with_totals(runs: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """Runs with what they used in all, each column of one type."""
    if runs.empty:
        names = [*_KEY, *_WHOLE, *_REAL, *_WORDS, "maximize", "hidden_size", "full", "confirm", "diverged"]
        return pd.DataFrame(columns=names)
    groups = steps.groupby(_KEY)
    totals = pd.DataFrame({"episodes": groups["episodes"].max(), "flops": groups["flops"].max()})
    for name, column, how in (("tokens", "num_tokens", "max"), ("update_seconds", "timing_s/update", "sum")):
        totals[name] = groups[column].agg(how) if column in steps.columns else float("nan")
    table = runs.merge(totals, left_on=_KEY, right_index=True, how="left")
    table = table.drop(columns=["episodes_per_step", "flops_per_token"])
    for name in (*_WHOLE, "hidden_size"):
        table[name] = table[name].astype("Int64")
    for name in _REAL:
        table[name] = table[name].astype(float)
    for name in _WORDS:
        table[name] = table[name].astype("string")
    for name in param_columns(table):
        table[name] = _one_type(table[name])
    for name in ("full", "confirm", "diverged"):
        table[name] = table[name].astype("boolean")
    return table


def load_trials(directory: str | Path) -> pd.DataFrame:
    """One row per trial of a sweep, or a run's one row; failed, pruned, running and damaged ones kept.

    Columns: number, configuration, seed, status, confirm (a re-run on a fresh seed), reason, a column per swept recipe
    key, the last evaluation's metrics (NaN unless COMPLETE, so that no unfinished run is taken for a finished one),
    `base/M`, `best/M`, `best/step` and `last/M` of the sweep's metric M whatever the status, step, seconds, run_dir
    (relative to `directory`).
    Raises UserError when `directory` is neither a run nor a sweep.
    """
    metric = metric_of(directory)
    records = read_records(directory)
    rows = [_trial_row(record, metric) for record in records]
    lead = [*_IDENTITY, "reason", *_params(records), metric]
    tail = [f"{part}/{metric}" for part in ("base", "best", "last")] + ["best/step", "step", "seconds", "run_dir"]
    others = sorted({name for row in rows for name in row} - {*lead, *tail})
    table = pd.DataFrame(rows, columns=[*lead, *others, *tail])
    for name in _params(records):
        table[name] = _one_type(table[name])
    for name in ("number", "configuration", "seed", "step", "best/step"):
        table[name] = table[name].astype("Int64")
    for name in (metric, *others, *tail[:3], "seconds"):
        table[name] = table[name].astype(float)
    return table.sort_values(["number", "run_dir"], ignore_index=True)


def load_steps(directory: str | Path) -> pd.DataFrame:
    """One row per run and step: number, configuration, seed, status, run_dir, step and every metric logged."""
    rows = [
        {**record.identity(), "run_dir": record.run_dir, **row}
        for record in read_records(directory)
        for row in record.rows
    ]
    table = pd.DataFrame(rows, columns=None if rows else [*_IDENTITY, "run_dir", "step"])
    for name in ("number", "configuration", "seed", "step"):
        table[name] = table[name].astype("Int64")
    # A step logged twice is a run that was killed between its log and its checkpoint: the later row stands.
    table = table.drop_duplicates(["run_dir", "step"], keep="last")
    return table.sort_values(["number", "run_dir", "step"], ignore_index=True)


def load_samples(directory: str | Path, *, run_dir: str | None = None) -> pd.DataFrame:
    """Sampled completions, one row each, of every run under `directory` or of one `run_dir`; damaged files warn."""
    frames = []
    for record in read_records(directory):
        if run_dir is not None and record.run_dir != run_dir:
            continue
        run = RunDir(Path(directory) / record.run_dir)
        for file in sorted(run.samples.glob("*.parquet")):
            try:
                check_own(run, file)
                frames.append(pd.read_parquet(file).assign(**record.identity(), run_dir=record.run_dir))
            except (UserError, OSError, ValueError) as error:
                warnings.warn(f"{file} cannot be read and is left out: {error}", stacklevel=2)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["step", "phase", "index"])


def write_results(directory: str | Path) -> pd.DataFrame:
    """Write the table of trials as `results.parquet` and `results.csv`, each whole or not at all, and return it."""
    table = load_trials(directory)
    run = RunDir(directory)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_bytes(run.results, buffer.getvalue())
    write_bytes(run.results.with_suffix(".csv"), table.to_csv(index=False).encode())
    return table


def metric_of(directory: str | Path) -> str:
    """The metric a sweep optimises; for a run its evaluation accuracy, or its reward when it never evaluated."""
    sweep = read_recipe(directory).get("sweep")
    manifest = RunDir(directory).read_manifest()
    if manifest.get("kind") == "sweep":
        return str(sweep["metric"]) if isinstance(sweep, dict) and "metric" in sweep else DEFAULT_METRIC
    rows = read_record(RunDir(directory), ".").rows
    return DEFAULT_METRIC if not rows or any(DEFAULT_METRIC in row for row in rows) else "reward"


def param_columns(trials: pd.DataFrame) -> list[str]:
    """The columns of a table of trials that are swept recipe keys: dotted, where a metric's name has slashes."""
    return [name for name in trials.columns if "." in name and "/" not in name]


def _trial_row(record: Record, metric: str) -> dict[str, Any]:
    result = record.manifest.get("result") or {}
    logged = [(int(row["step"]), row[metric]) for row in record.rows if metric in row]
    trained = [(step, value) for step, value in logged if step > 0 and value == value]
    best = _best(trained, metric)
    finals = (result.get("metrics") or {}) if record.status == Status.COMPLETE.value else {}
    if record.status == Status.COMPLETE.value and metric not in finals and trained:
        finals = {**finals, metric: trained[-1][1]}
    steps = [int(row["step"]) for row in record.rows]
    return {
        **record.identity(),
        "reason": record.reason,
        **{key: _cell(value) for key, value in record.params.items()},
        **{name: value for name, value in finals.items() if isinstance(value, int | float) and name != "step"},
        f"base/{metric}": next((value for step, value in logged if step == 0), (result.get("base") or {}).get(metric)),
        f"best/{metric}": best[1] if best else None,
        f"last/{metric}": trained[-1][1] if trained else None,
        "best/step": best[0] if best else None,
        "step": max(steps) if steps else result.get("step"),
        "seconds": record.seconds,
        "run_dir": record.run_dir,
    }


def _best(trained: list[tuple[int, float]], metric: str) -> tuple[int, float] | None:
    if not trained:
        return None
    choose = max if metrics.direction(metric) == "maximize" else min
    return choose(trained, key=lambda point: point[1])


def _params(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record.params))


def _cell(value: Any) -> Any:
    """A parameter as one scalar: a column of lists can be neither grouped nor written to parquet."""
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else json.dumps(value)


def _one_type(column: pd.Series) -> pd.Series:
    """A parameter's column as numbers when every value is one, else as text: a mixed column cannot be written."""
    given = column.dropna()
    if any(isinstance(value, str) for value in given):
        return column.map(str, na_action="ignore").astype("string")
    whole = all(isinstance(value, int) or float(value).is_integer() for value in given)
    return column.astype("Int64" if whole else float)
