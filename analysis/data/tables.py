"""Load run and sweep directories as tidy pandas tables, and write them to disk."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from analysis.data import columns, rows
from analysis.data.columns import IDENTITY, NEEDED, RUN_COLUMNS, SAMPLE_COLUMNS
from analysis.data.commands import Commands
from analysis.data.records import OTHER_INPUTS, Record, check_inside, read_records
from analysis.data.sources import source_row
from harness.core.cli import invocation
from harness.core.errors import UserError
from harness.records.files import write_bytes
from harness.records.run_dir import RunDir

TABLES = tuple(f"{name}.parquet" for name in NEEDED)


@dataclass(frozen=True, slots=True)
class Tables:
    """Any number of runs and sweeps as tidy tables; (`directory`, `run_dir`) is a run in each.

    `runs`: a row per run, whatever its status. `steps`: a row per run and logged step. `samples`: a
    row per kept completion (step, phase, index, reward, …). `sources`: a row per directory (see
    `sources.source_row`).
    """

    runs: pd.DataFrame
    steps: pd.DataFrame
    samples: pd.DataFrame
    sources: pd.DataFrame

    def write(self, folder: str | Path) -> None:
        """Write the tables as parquet files, each whole or not at all."""
        for part in fields(self):
            write_bytes(Path(folder) / f"{part.name}.parquet", _parquet(getattr(self, part.name)))

    @classmethod
    def read(cls, folder: str | Path) -> Tables:
        """Read what `write` wrote; raises UserError for a missing, damaged or foreign table."""
        tables = {}
        for name, needed in NEEDED.items():
            file = Path(folder) / f"{name}.parquet"
            try:
                tables[name] = pd.read_parquet(file)
            except (OSError, ValueError) as error:
                raise UserError("a table cannot be read", got=f"{file}: {error}") from None
            if missing := [column for column in needed if column not in tables[name].columns]:
                fix = f"write it again: {invocation('report')} DIR"
                got = f"{file}: no {', '.join(missing)}"
                raise UserError("a table lacks columns", got=got, fix=fix)
        columns.check_tables(tables, Path(folder))
        return cls(**tables)

    @classmethod
    def joined(cls, parts: Iterable[Tables]) -> Tables:
        """Return the rows of several tables; a directory that several hold is taken once."""
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
        """Return the rows of some directories.

        Columns of recipe keys and metrics that none of these directories has are left out.
        """
        names = list(directories)
        chosen = {}
        for part in fields(self):
            table = getattr(self, part.name)
            table = table[table["directory"].isin(names)].reset_index(drop=True)
            if part.name in ("runs", "steps"):
                costs = RUN_COLUMNS if part.name == "runs" else columns.COSTS
                always = {*NEEDED[part.name], *costs}
                empty = table.columns[table.isna().all()]
                table = table.drop(columns=[name for name in empty if name not in always])
            chosen[part.name] = table
        return Tables(**chosen)


def load(directories: Iterable[str | Path]) -> Tables:
    """Return the tables of run and sweep directories; raises UserError for any other directory.

    Columns of `runs`: `directory`, `run_dir`, number, configuration, seed, status, confirm (a
    re-run on a fresh seed), reason, `metric`, `maximize`, `score` (NaN unless COMPLETE, so that no
    unfinished run is taken for a finished one), `last`, `best`, `best_step`, `base`, `step`,
    `seconds`, `created`, `started`, `ended` (seconds since 1970, UTC), `tokens`, `flops`,
    `episodes`, `update_seconds` (its own share of a pack's), `problems`, `command`, those of
    `facts.run_facts`, one per swept recipe key of any sweep, and one per other final metric.
    """
    paths = dict.fromkeys(Path(directory).resolve() for directory in directories)
    return Tables.joined(_load(path) for path in paths)


def _load(directory: Path) -> Tables:
    records = read_records(directory)
    source = source_row(directory, RunDir(directory).read_manifest(), records)
    commands = Commands(directory)
    name = {"directory": source["directory"]}
    filled = [
        {
            **name,
            **rows.run_row(record, directory, source["metric"]),
            "command": commands.command(record),
        }
        for record in records
    ]
    runs, steps = pd.DataFrame(filled), _steps(records).assign(**name)
    if filled:
        steps = rows.with_costs(steps, runs)
        runs = rows.on_one_input(rows.with_totals(runs, steps), json.loads(source["seeds"]))
        apart = runs["status"] == OTHER_INPUTS
        if apart.any():
            steps.loc[steps["run_dir"].isin(runs.loc[apart, "run_dir"]), "status"] = OTHER_INPUTS
            counts = runs.loc[~apart, "problems"].dropna().unique()
            source["problems"] = int(counts[0]) if len(counts) == 1 else None
    else:
        runs = pd.DataFrame(columns=[*name, *RUN_COLUMNS])
    sources = pd.DataFrame([source], columns=list(columns.SOURCE_COLUMNS)).astype(
        {
            **dict.fromkeys(columns.SOURCE_TEXTS, "string"),
            **dict.fromkeys(columns.SOURCE_NUMBERS, float),
            "problems": "Int64",
        }
    )
    parts = runs, steps, _samples(directory, records).assign(**name), sources
    # Through parquet, so that a report of a directory equals one of its written tables.
    return Tables(*(pd.read_parquet(io.BytesIO(_parquet(part))) for part in parts))


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False, compression="zstd")  # smaller than snappy, as fast
    return buffer.getvalue()


def _concat(parts: list[pd.DataFrame]) -> pd.DataFrame:
    if len(parts) == 1:
        return parts[0]
    table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    for name in columns.param_columns(table):
        table[name] = rows.one_type(table[name])
    return table


def _steps(records: list[Record]) -> pd.DataFrame:
    """Return one row per run and step, with every logged metric."""
    logged = [
        {**record.identity(), "run_dir": record.run_dir, **row}
        for record in records
        for row in record.rows
    ]
    table = pd.DataFrame(logged, columns=None if logged else [*IDENTITY, "run_dir", "step"])
    table = table.astype(dict.fromkeys(("number", "configuration", "seed", "step"), "Int64"))
    # A run that was killed between log and checkpoint logs a step twice: the later row counts.
    table = table.drop_duplicates(["run_dir", "step"], keep="last")
    return table.sort_values(["number", "run_dir", "step"], ignore_index=True)


def _samples(directory: Path, records: list[Record]) -> pd.DataFrame:
    """Return the kept completions, one row each; a damaged file is left out with a warning."""
    frames = []
    for record in records:
        run = RunDir(directory / record.run_dir)
        for file in sorted(run.samples.glob("*.parquet")):
            try:
                check_inside(run, file)
                kept = pd.read_parquet(file)
                if missing := [name for name in SAMPLE_COLUMNS if name not in kept.columns]:
                    raise ValueError(f"no column {', '.join(missing)}")
            except (UserError, OSError, ValueError) as error:
                warnings.warn(f"{file} cannot be read and is left out: {error}", stacklevel=4)
                continue
            # A run that keeps no samples writes files without rows.
            if len(kept):
                frames.append(kept.assign(**record.identity(), run_dir=record.run_dir))
    empty = pd.DataFrame(columns=[*IDENTITY, "run_dir", *SAMPLE_COLUMNS])
    table = pd.concat(frames, ignore_index=True) if frames else empty
    return table.astype(dict.fromkeys(("number", "configuration", "seed"), "Int64"))


def write_results(directory: str | Path, trials: pd.DataFrame) -> None:
    """Write a table of trials as a directory's `results.parquet` and `results.csv`."""
    run = RunDir(directory)
    write_bytes(run.results, _parquet(trials))
    write_bytes(run.results.with_suffix(".csv"), trials.to_csv(index=False).encode())
