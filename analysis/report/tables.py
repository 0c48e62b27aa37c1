"""Build the report's tables: each cell as text, what it sorts by, and the bars of score ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.data import labels
from analysis.experiment import Experiment
from harness.config import metrics
from harness.records.run_dir import Status

# Columns of trials that are left out, and said once, where all rows have the same value.
SAID_ONCE = ("seed", "steps")
# Further settings of a trial stand together in one column: the table fits a page of 1280 pixels.
MOST_AXES = 5
# A longer reason is cut in the table; the manifest has all of it.
SHOWN_REASON = 300
# Room at either end of the bars' axis, as a share of what it spans.
MARGIN = 0.04
Sort = float | str | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title, the text of a row's cell, what it sorts by, and whether it holds words.

    By default it sorts by its text. `drawn`: its cells show a bar as well (see `bars`).
    """

    title: str
    cell: Callable[[pd.Series], str]
    words: bool = False
    sort: Callable[[pd.Series], Sort] | None = None
    drawn: bool = False

    def key(self, row: pd.Series) -> Sort:
        """Return what a row sorts by; None, which comes last in either order, without a value."""
        if self.sort is not None:
            return self.sort(row)
        text = self.cell(row)
        return None if text == "–" else text


@dataclass(frozen=True, slots=True)
class Row:
    """One row's cells and sort keys; `best` is the winner, `muted` does not count.

    A trial has its status, number and command as well.
    """

    cells: list[str]
    sort: list[Sort]
    best: bool
    muted: bool
    status: str = ""
    number: int | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table for a template; `same` says what all rows have in common and no column shows."""

    columns: list[Column]
    rows: list[Row]
    same: str = ""

    @classmethod
    def of(
        cls,
        columns: list[Column],
        rows: pd.DataFrame,
        best: Callable[[pd.Series], bool],
        muted: Callable[[pd.Series], bool],
    ) -> Table:
        """Fill the columns for each row."""
        filled = [
            Row(
                cells=[column.cell(row) for column in columns],
                sort=[column.key(row) for column in columns],
                best=bool(best(row)),
                muted=bool(muted(row)),
                status=str(row.get("status") or ""),
                number=int(row["number"]) if pd.notna(row.get("number")) else None,
                command=row.get("command"),
            )
            for _, row in rows.iterrows()
        ]
        return cls(columns, filled)

    def top(self, count: int) -> Table:
        """Return the first rows alone."""
        return Table(self.columns, self.rows[:count])


@dataclass(frozen=True, slots=True)
class Bar:
    """A configuration's range, mean and the base, as percentages of the axis; None for none."""

    low: float | None
    mean: float
    high: float | None
    base: float | None


def configurations(experiment: Experiment) -> Table:
    """Return the table of configurations, best first; those without all seeds last and unranked.

    A row has the range of its seeds, or with one seed the interval over the held-out problems.
    """
    metric, rows = experiment.metric, experiment.configurations
    several, fresh = len(experiment.seeds) > 1, bool(rows["fresh"].notna().any())
    in_sweep = " in the sweep" if fresh else ""
    title = ("range in the sweep" if fresh else "seeds' range") if several else "95% interval"
    runs, seeds = experiment.tables.runs, len(experiment.seeds)

    def span(row: pd.Series) -> str:
        known = pd.notna(row["low"])
        return labels.score_range(metric, row["low"], row["high"]) if known else "–"

    def ended(row: pd.Series) -> str:
        if seeds == 1:
            return str(row["statuses"]).removeprefix("1 ")
        return f"{row['n']} of {seeds}" + ("" if row["whole"] else f": {row['statuses']}")

    def inputs(row: pd.Series) -> Iterable[Any]:
        return runs.loc[runs["configuration"] == row["configuration"], "inputs"]

    columns = [
        integer("place", "rank"),
        score(f"{labels.metric(metric)}{in_sweep}", "mean", metric),
        *([score("on fresh seeds", "fresh", metric)] if fresh else []),
        *(_axis(key) for key in experiment.axes),
        Column(title, span, sort=number("low"), drawn=True),
        integer("config", "configuration"),
        *_inputs([experiment], inputs),
        Column("seeds" if several else "status", ended, words=True),
    ]
    winner = experiment.best.configuration if experiment.best else None
    return Table.of(
        columns, rows, lambda row: row["configuration"] == winner, lambda row: not row["whole"]
    )


def trials(experiments: Sequence[Experiment]) -> Table:
    """Return the table of every trial and how it ended.

    The last score of a trial that did not complete is in brackets, because it does not count. The
    trials of several experiments have a column for these, and settings that only some experiments
    swept stand together in one column. `same` has the columns of `SAID_ONCE` that are left out.
    """
    several = len(experiments) > 1
    swept = several or experiments[0].is_sweep
    axes = list(dict.fromkeys(key for experiment in experiments for key in experiment.axes))
    everywhere = [key for key in axes if all(key in experiment.axes for experiment in experiments)]
    apart = everywhere[:MOST_AXES]
    together = [key for key in axes if key not in apart]
    names = {labels.metric(experiment.metric) for experiment in experiments}
    columns = [
        *([Column("sweep", lambda row: str(row["name"]), words=True)] if several else []),
        *([integer("trial", "number")] if swept else []),
        Column(names.pop() if len(names) == 1 else "score", _final, sort=number("score")),
        *(_axis(key) for key in apart),
        *([Column("other settings", _settings(together), words=True)] if together else []),
        integer("seed", "seed"),
        Column("best (step)", _peak, sort=number("best")),
        integer("steps", "step"),
        Column("time", lambda row: duration(row["seconds"]), sort=number("seconds")),
        *_inputs(experiments, lambda row: [row["inputs"]]),
        Column("status", _status, words=True),
    ]
    rows = [experiment.tables.runs.assign(name=experiment.name) for experiment in experiments]
    winners = set()
    for experiment in experiments:
        best = experiment.best_trial()
        winners |= set() if best is None else {(experiment.directory, best["run_dir"])}
    table = Table.of(
        columns,
        pd.concat(rows, ignore_index=True),
        lambda row: (row["directory"], row["run_dir"]) in winners,
        lambda row: row["status"] != Status.COMPLETE.value,
    )
    return _said_once(table) if swept else table


def bars(experiment: Experiment) -> list[Bar | None]:
    """Return a bar for each row of `experiment.configurations`.

    None for a row without a score, or where all scores are equal.
    """
    table, base = experiment.configurations, experiment.base
    numbers = table[["low", "mean", "high"]].to_numpy(float).ravel().tolist()
    ends = [end for end in numbers if end == end] + ([] if base is None else [base])
    first, last = min(ends, default=0.0), max(ends, default=0.0)
    if not first < last:
        return [None] * len(table)
    room = MARGIN * (last - first)
    first, last = first - room, last + room

    def place(value: float | None) -> float | None:
        if value is None or pd.isna(value):
            return None
        return round(100 * (float(value) - first) / (last - first), 1)

    placed = [[place(row[name]) for name in ("low", "mean", "high")] for _, row in table.iterrows()]
    return [
        None if mean is None else Bar(low, mean, high, place(base)) for low, mean, high in placed
    ]


def number(name: str) -> Callable[[pd.Series], Sort]:
    """Return what a column of numbers sorts by."""
    return lambda row: None if pd.isna(row[name]) else float(row[name])


def integer(title: str, name: str, form: str = "d") -> Column:
    """Return a column of whole numbers."""

    def cell(row: pd.Series) -> str:
        return "–" if pd.isna(row[name]) else f"{int(row[name]):{form}}"

    return Column(title, cell, sort=number(name))


def score(title: str, name: str, metric: str | None = None) -> Column:
    """Return a column of scores, by default in the row's own metric."""

    def cell(row: pd.Series) -> str:
        value = None if pd.isna(row[name]) else float(row[name])
        return labels.score(metric or row["metric"], value)

    return Column(title, cell, sort=number(name))


def duration(seconds: Any) -> str:
    """Write a time; `–` for none."""
    return "–" if pd.isna(seconds) else metrics.duration(float(seconds))


def _said_once(table: Table) -> Table:
    """Leave out the columns of `SAID_ONCE` in which all rows are equal."""
    kept, said = [], []
    for place, column in enumerate(table.columns):
        values = {row.cells[place] for row in table.rows}
        if column.title in SAID_ONCE and len(values) == 1:
            said.append(f"{column.title} {values.pop()}")
        else:
            kept.append(place)
    rows = [
        replace(row, cells=[row.cells[p] for p in kept], sort=[row.sort[p] for p in kept])
        for row in table.rows
    ]
    return Table([table.columns[place] for place in kept], rows, labels.listed(said))


def _inputs(
    experiments: Sequence[Experiment], of: Callable[[pd.Series], Iterable[Any]]
) -> list[Column]:
    """Return a column of the inputs that a row's runs were trained on, where any changed."""
    if not any(experiment.inputs_changed for experiment in experiments):
        return []

    def cell(row: pd.Series) -> str:
        return ", ".join(sorted({str(inputs) for inputs in of(row) if pd.notna(inputs)})) or "–"

    return [Column("inputs", cell, words=True)]


def _axis(key: str) -> Column:
    """Return the column of a swept key."""

    def sort(row: pd.Series) -> Sort:
        value = row.get(key)
        if pd.isna(value) or not _matters(key, row):
            return None
        return value if isinstance(value, str) else float(value)

    def cell(row: pd.Series) -> str:
        value = row.get(key)
        return labels.value(key, None if pd.isna(value) else value) if _matters(key, row) else "–"

    return Column(labels.key(key), cell, words=key == labels.TARGETS, sort=sort)


def _matters(key: str, row: pd.Series) -> bool:
    rank = row.get(labels.RANK)
    return labels.matters(key, {labels.RANK: None if pd.isna(rank) else rank})


def _settings(keys: Sequence[str]) -> Callable[[pd.Series], str]:
    """Return a cell of several keys and their values."""

    def cell(row: pd.Series) -> str:
        known = [key for key in keys if pd.notna(row.get(key)) and _matters(key, row)]
        return labels.settings({key: row[key] for key in known}) or "–"

    return cell


def _peak(row: pd.Series) -> str:
    if pd.isna(row["best_step"]):
        return "–"
    return f"{labels.score(row['metric'], float(row['best']))} ({row['best_step']})"


def _final(row: pd.Series) -> str:
    if pd.notna(row["score"]):
        return labels.score(row["metric"], float(row["score"]))
    return f"({labels.score(row['metric'], float(row['last']))})" if pd.notna(row["last"]) else "–"


def _status(row: pd.Series) -> str:
    status, reason = str(row["status"]).lower(), row["reason"]
    if not isinstance(reason, str):
        return status
    return f"{status}: {reason if len(reason) <= SHOWN_REASON else f'{reason[:SHOWN_REASON]} …'}"
