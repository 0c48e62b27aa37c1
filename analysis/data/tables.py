"""Run and sweep directories as tidy pandas tables. Facts come from the files' contents, never from
names.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from analysis.data import columns, rows, sources
from analysis.data.commands import Commands
from analysis.data.records import OTHER_INPUTS, Record, check_own, parsed_recipe, read_records
from harness.core.cli import invocation
from harness.core.errors import UserError
from harness.records.run_dir import RunDir, write_bytes

_KEY, _LEAD = rows.KEY, list(rows.IDENTITY)
_SAMPLE = ("step", "phase", "index", "question", "ground_truth", "completion", "reward")
# What an `Experiment` cannot do without.
_NEEDED = {
    "runs": [*_KEY, *_LEAD, "metric", "score", "command", "best_step"],
    "steps": [*_KEY, *_LEAD, "step"],
    "samples": [*_KEY, "seed", *_SAMPLE],
    "sources": list(sources.COLUMNS),
}
TABLES = tuple(f"{name}.parquet" for name in _NEEDED)


@dataclass(frozen=True, slots=True)
class Tables:
    """Any number of runs and sweeps as tidy tables; a run is (`directory`, `run_dir`) in each.

    `runs`: a row per run, whatever became of it. `steps`: a row per run and logged step. `samples`:
    a row per kept completion (step, phase, index, reward, …). `sources`: a row per directory (see
    `sources.source_row`).
    """

    runs: pd.DataFrame
    steps: pd.DataFrame
    samples: pd.DataFrame
    sources: pd.DataFrame

    def write(self, folder: str | Path) -> None:
        """Write the tables as parquet files, each whole or not at all: with these alone a report
        can be redrawn.
        """
        for part in fields(self):
            write_bytes(Path(folder) / f"{part.name}.parquet", _parquet(getattr(self, part.name)))

    @classmethod
    def read(cls, folder: str | Path) -> Tables:
        """Read what `write` wrote; raises UserError when a table is missing, damaged or none of
        these.
        """
        found = {}
        for part in fields(cls):
            file = Path(folder) / f"{part.name}.parquet"
            try:
                found[part.name] = pd.read_parquet(file)
            except (OSError, ValueError) as error:
                raise UserError("a table cannot be read", got=f"{file}: {error}") from None
            missing = [name for name in _NEEDED[part.name] if name not in found[part.name].columns]
            if missing:
                raise UserError(
                    "a table lacks columns",
                    got=f"{file}: no {', '.join(missing)}",
                    fix=f"write it again: {invocation('report')} DIR",
                )
            columns.check(part.name, found[part.name], file)
        columns.check_sources(found["sources"], Path(folder) / "sources.parquet")
        recipes = {
            row["directory"]: parsed_recipe(row["recipe"] or "")
            for _, row in found["sources"].iterrows()
        }
        columns.check_shares(found, recipes, Path(folder))
        return cls(**found)

    @classmethod
    def joined(cls, parts: Iterable[Tables]) -> Tables:
        """The rows of several tables, a directory that is in more than one only once."""
        known: set[str] = set()
        kept = []
        for part in parts:
            new = [name for name in part.sources["directory"] if name not in known]
            known.update(new)
            kept.append(part if len(new) == len(part.sources) else part.of(new))
        return cls(
            *(_concat([getattr(part, field.name) for part in kept]) for field in fields(cls))
        )

    def of(self, directories: Iterable[str]) -> Tables:
        """The rows of some directories, without the columns of recipe keys and metrics that none of
        them has.
        """
        wanted = list(directories)
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen = {name: table[table["directory"].isin(wanted)] for name, table in parts.items()}
        for name in ("runs", "steps"):
            table = chosen[name].dropna(axis="columns", how="all")
            own = [
                column
                for column in chosen[name].columns
                if column in table.columns or not _is_open(name, column)
            ]
            chosen[name] = chosen[name][own]
        return Tables(**{name: table.reset_index(drop=True) for name, table in chosen.items()})


def load(directories: Iterable[str | Path]) -> Tables:
    """The tables of any number of run and sweep directories; raises UserError for one that is
    neither.

    Columns of `runs`: `directory`, `run_dir`, number, configuration, seed, status, confirm (a
    re-run on a fresh seed), reason, `metric`, `maximize`, `score` (NaN unless COMPLETE, so that no
    unfinished run is taken for a finished one), `last`, `best`, `best_step`, `base`, `step`,
    `seconds`, `created`, `started`, `ended` (seconds since 1970, UTC), `tokens`, `flops`,
    `episodes`, `update_seconds` (its own share of a pack's), `problems`, `command`, `facts.facts`',
    one per swept recipe key of any sweep, and one per other final metric.
    """
    places = list(dict.fromkeys(Path(directory).resolve() for directory in directories))
    return Tables.joined(_load(place) for place in places)


def _load(directory: Path) -> Tables:
    records = read_records(directory)
    source = sources.source_row(directory, RunDir(directory).read_manifest(), records)
    commands = Commands(directory)
    lead = {"directory": source["directory"]}
    found = [
        {
            **lead,
            **rows.run_row(record, directory, source["metric"]),
            "command": commands.command(record),
        }
        for record in records
    ]
    runs, steps = pd.DataFrame(found), _steps(records).assign(**lead)
    if found:
        steps = rows.with_costs(steps, runs)
        runs = rows.on_one_input(rows.with_totals(runs, steps), json.loads(str(source["seeds"])))
        apart = runs[runs["status"] == OTHER_INPUTS]
        if len(apart):
            steps.loc[steps["run_dir"].isin(apart["run_dir"]), "status"] = OTHER_INPUTS
            counts = runs.loc[runs["status"] != OTHER_INPUTS, "problems"].dropna().unique()
            source["problems"] = int(counts[0]) if len(counts) == 1 else None
    else:
        runs = pd.DataFrame(columns=[*lead, *rows.COLUMNS])
    samples = _samples(directory, records).assign(**lead)
    parts = runs, steps, samples, _source_table(source)
    # As they are read again, so that a report from the directory and one from its tables are the
    # same.
    return Tables(*(pd.read_parquet(io.BytesIO(_parquet(part))) for part in parts))


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")  # smaller than snappy, as fast
    return buffer.getvalue()


def _concat(parts: list[pd.DataFrame]) -> pd.DataFrame:
    if len(parts) == 1:
        return parts[0]
    filled = [part for part in parts if len(part)] or parts[:1]
    table = pd.concat(filled, ignore_index=True)
    for name in rows.param_columns(table):
        table[name] = rows.one_type(table[name])
    return table


def _is_open(name: str, column: str) -> bool:
    """Whether a column is there only where a run has such a recipe key or metric."""
    return column not in (*_NEEDED[name], *(rows.COLUMNS if name == "runs" else rows.COSTS))


def _source_table(source: dict[str, object]) -> pd.DataFrame:
    table = pd.DataFrame([source], columns=list(sources.COLUMNS))
    for name in sources.WORDS:
        table[name] = table[name].astype("string")
    for name in sources.REAL:
        table[name] = table[name].astype(float)
    table["problems"] = table["problems"].astype("Int64")
    return table


def _steps(records: list[Record]) -> pd.DataFrame:
    """One row per run and step, with every metric logged."""
    found = [
        {**record.identity(), "run_dir": record.run_dir, **row}
        for record in records
        for row in record.rows
    ]
    table = pd.DataFrame(found, columns=None if found else [*_LEAD, "run_dir", "step"])
    for name in ("number", "configuration", "seed", "step"):
        table[name] = table[name].astype("Int64")
    # A step logged twice is a run that was killed between its log and its checkpoint: the later row
    # stands.
    table = table.drop_duplicates(["run_dir", "step"], keep="last")
    return table.sort_values(["number", "run_dir", "step"], ignore_index=True)


def _samples(directory: Path, records: list[Record]) -> pd.DataFrame:
    """Sampled completions, one row each; a damaged file is left out with a warning."""
    frames = []
    for record in records:
        run = RunDir(directory / record.run_dir)
        for file in sorted(run.samples.glob("*.parquet")):
            try:
                check_own(run, file)
                kept = pd.read_parquet(file)
                if missing := [name for name in _SAMPLE if name not in kept.columns]:
                    raise ValueError(f"no column {', '.join(missing)}")
            except (UserError, OSError, ValueError) as error:
                warnings.warn(f"{file} cannot be read and is left out: {error}", stacklevel=4)
                continue
            # A run that keeps no samples writes files without rows.
            if len(kept):
                frames.append(kept.assign(**record.identity(), run_dir=record.run_dir))
    empty = pd.DataFrame(columns=[*_LEAD, "run_dir", *_SAMPLE])
    table = pd.concat(frames, ignore_index=True) if frames else empty
    for name in ("number", "configuration", "seed"):
        table[name] = table[name].astype("Int64")
    return table


def load_trials(directory: str | Path) -> pd.DataFrame:
    """One row per trial of a sweep, or a run's one row; failed, pruned, running and damaged ones
    kept.

    Columns as `rows.as_trials` says. Raises UserError when `directory` is neither a run nor a
    sweep.
    """
    tables = load([directory])
    return rows.as_trials(tables.runs, str(tables.sources["metric"].iloc[0]))


def write_results(directory: str | Path, trials: pd.DataFrame) -> None:
    """Write a table of trials as a directory's `results.parquet` and `results.csv`, each whole or
    not at all.
    """
    run = RunDir(directory)
    write_bytes(run.results, _parquet(trials))
    write_bytes(run.results.with_suffix(".csv"), trials.to_csv(index=False).encode())
