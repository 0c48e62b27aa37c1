"""The report's tables: what each column shows, cell by cell, as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import labels
from analysis.experiment import Experiment
from harness import metrics
from harness.rundir import Status

# A reason longer than this is cut in the table; the manifest has all of it.
SHOWN_REASON = 300


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title, how a row's cell reads, and whether it holds words rather than numbers."""

    title: str
    cell: Callable[[pd.Series], str]
    words: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One row's cells; `best` is the winner, `muted` does not count."""

    cells: list[str]
    best: bool
    muted: bool


@dataclass(frozen=True, slots=True)
class Table:
    """A table ready for a template."""

    columns: list[Column]
    rows: list[Row]


def configurations(experiment: Experiment) -> Table:
    """Configurations ranked by their mean over seeds; those without all their seeds last and unranked."""
    score, many = _score(experiment), len(experiment.seeds) > 1
    columns = [
        _count("place", "rank"),
        Column(labels.metric(experiment.metric), lambda row: score(row["mean"])),
        *_axes(experiment),
        Column("95% interval", lambda row: _range(score, row["low"], row["high"])),
    ]
    if many:
        columns += [
            Column("seeds' range", lambda row: _range(score, row["min"], row["max"])),
        ]
    columns.append(_count("config", "configuration"))
    columns.append(Column("seeds" if many else "status", lambda row: _seeds(row, len(experiment.seeds)), words=True))
    winner = experiment.best.configuration if experiment.best else None
    rows = experiment.configurations
    return _table(columns, rows, lambda row: row["configuration"] == winner, lambda row: not row["whole"])


def trials(experiment: Experiment) -> Table:
    """Every trial with how it ended; the last score of one that did not complete is in brackets: it does not count."""
    score, metric = _score(experiment), experiment.metric
    number = [_count("trial", "number")] if experiment.is_sweep else []
    configuration = [_count("config", "configuration")] if experiment.is_sweep else []
    columns = [
        *number,
        Column(labels.metric(metric), lambda row: _final(row, metric, score)),
        *_axes(experiment),
        *configuration,
        _count("seed", "seed"),
        Column("best (step)", lambda row: _peak(row, metric, score)),
        _count("steps", "step"),
        Column("time", lambda row: metrics.duration(row["seconds"]) if pd.notna(row["seconds"]) else "–"),
        Column("status", _status, words=True),
    ]
    best = experiment.best_trial()
    winner = None if best is None else best["run_dir"]
    done, rows = Status.COMPLETE.value, experiment.trials
    return _table(columns, rows, lambda row: row["run_dir"] == winner, lambda row: row["status"] != done)


def _table(
    columns: list[Column], rows: pd.DataFrame, best: Callable[[pd.Series], bool], muted: Callable[[pd.Series], bool]
) -> Table:
    filled = [
        Row([column.cell(row) for column in columns], bool(best(row)), bool(muted(row))) for _, row in rows.iterrows()
    ]
    return Table(columns, filled)


def _count(title: str, name: str) -> Column:
    return Column(title, lambda row: "–" if pd.isna(row[name]) else str(int(row[name])))


def _axes(experiment: Experiment) -> list[Column]:
    return [Column(labels.key(key), _axis_cell(key), words=key == labels.TARGETS) for key in experiment.axes]


def _axis_cell(key: str) -> Callable[[pd.Series], str]:
    def cell(row: pd.Series) -> str:
        rank = row.get(labels.RANK)
        values = {labels.RANK: None if pd.isna(rank) else rank}
        return labels.value(key, None if pd.isna(row[key]) else row[key]) if labels.matters(key, values) else "–"

    return cell


def _score(experiment: Experiment) -> Callable[[Any], str]:
    return lambda given: labels.score(experiment.metric, None if pd.isna(given) else float(given))


def _peak(row: pd.Series, metric: str, score: Callable[[Any], str]) -> str:
    return f"{score(row[f'best/{metric}'])} ({row['best/step']})" if pd.notna(row["best/step"]) else "–"


def _final(row: pd.Series, metric: str, score: Callable[[Any], str]) -> str:
    if pd.notna(row[metric]):
        return score(row[metric])
    return f"({score(row[f'last/{metric}'])})" if pd.notna(row[f"last/{metric}"]) else "–"


def _seeds(row: pd.Series, seeds: int) -> str:
    if seeds == 1:
        return str(row["statuses"]).removeprefix("1 ")
    return f"{row['n']} of {seeds}" + ("" if row["whole"] else f": {row['statuses']}")


def _status(row: pd.Series) -> str:
    status = str(row["status"]).lower()
    if not isinstance(row["reason"], str):
        return status
    reason = row["reason"] if len(row["reason"]) <= SHOWN_REASON else f"{row['reason'][:SHOWN_REASON]} …"
    return f"{status}: {reason}"


def _range(score: Callable[[Any], str], low: float, high: float) -> str:
    return f"{score(low)} to {score(high)}" if pd.notna(low) else "–"
