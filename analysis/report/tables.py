"""The report's tables: what each column shows, cell by cell, as text, and what it sorts by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.data import labels
from analysis.experiment import Experiment
from harness.config import metrics
from harness.records.run_dir import Status

# Columns of trials that are left out, and said once, where all rows have the same.
SAID_ONCE = ("seed", "steps")
# A trial's settings past so many columns stand together in one: the table fits a page of 1280
# pixels.
MOST_AXES = 5
# A reason longer than this is cut in the table; the manifest has all of it.
SHOWN_REASON = 300
Sort = float | str | None


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title, how a row's cell reads, what it sorts by (by default its text), and whether
    it holds words.

    `drawn`: its cells show a bar as well (see `bars`).
    """

    title: str
    cell: Callable[[pd.Series], str]
    words: bool = False
    sort: Callable[[pd.Series], Sort] | None = None
    drawn: bool = False

    def key(self, row: pd.Series) -> Sort:
        """What a row sorts by in this column; None for a row without a value, which comes last
        either way.
        """
        if self.sort is not None:
            return self.sort(row)
        text = self.cell(row)
        return None if text == "–" else text


@dataclass(frozen=True, slots=True)
class Row:
    """One row's cells and sort keys; `best` is the winner, `muted` does not count; a trial's number
    and command.
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
    """A table ready for a template; `same` names what all rows have in common and no
    column shows.
    """

    columns: list[Column]
    rows: list[Row]
    same: str = ""

    def top(self, count: int) -> Table:
        """The first rows alone."""
        return Table(self.columns, self.rows[:count])


def configurations(experiment: Experiment) -> Table:
    """Configurations, best first; those without all their seeds last and unranked.

    With several seeds a row has their range, with one the interval over the held-out problems.
    """
    score, many = _score(experiment), len(experiment.seeds) > 1
    again = bool(experiment.configurations["fresh"].notna().any())
    name = labels.metric(experiment.metric) + (" in the sweep" if again else "")
    columns = [
        _count("place", "rank"),
        Column(name, lambda row: score(row["mean"]), sort=number("mean")),
    ]
    if again:
        columns.append(
            Column("on fresh seeds", lambda row: score(row["fresh"]), sort=number("fresh"))
        )
    columns += _axes(experiment.axes)
    title = ("range in the sweep" if again else "seeds' range") if many else "95% interval"
    columns.append(
        Column(
            title,
            lambda row: _range(score, row["low"], row["high"]),
            sort=number("low"),
            drawn=True,
        )
    )
    columns.append(_count("config", "configuration"))
    runs = experiment.tables.runs
    columns += _inputs(
        [experiment], lambda row: runs.loc[runs["configuration"] == row["configuration"], "inputs"]
    )
    columns.append(
        Column(
            "seeds" if many else "status",
            lambda row: _seeds(row, len(experiment.seeds)),
            words=True,
        )
    )
    winner = experiment.best.configuration if experiment.best else None
    rows = experiment.configurations
    return _table(
        columns, rows, lambda row: row["configuration"] == winner, lambda row: not row["whole"]
    )


def trials(experiments: Sequence[Experiment]) -> Table:
    """Every trial with how it ended; the last score of one that did not complete is in brackets: it
    does not count.

    Several experiments' trials stand one after another, with a column for which they belong to;
    what only some of them swept stands together in one column. What all have in common of
    `SAID_ONCE` is in `same`.
    """
    one, many = experiments[0], len(experiments) > 1
    swept = many or one.is_sweep
    axes = list(dict.fromkeys(key for experiment in experiments for key in experiment.axes))
    apart = [key for key in axes if all(key in experiment.axes for experiment in experiments)][
        :MOST_AXES
    ]
    together = [key for key in axes if key not in apart]
    names = {labels.metric(experiment.metric) for experiment in experiments}
    lead = [Column("sweep", lambda row: str(row["name"]), words=True)] if many else []
    columns = [
        *lead,
        *([_count("trial", "number")] if swept else []),
        Column(names.pop() if len(names) == 1 else "score", _final, sort=number("score")),
        *_axes(apart),
        *([Column("other settings", _settings(together), words=True)] if together else []),
        _count("seed", "seed"),
        Column("best (step)", _peak, sort=number("best")),
        _count("steps", "step"),
        Column("time", lambda row: _duration(row["seconds"]), sort=number("seconds")),
        *_inputs(experiments, lambda row: [row["inputs"]]),
        Column("status", _status, words=True),
    ]
    rows, winners = (
        pd.concat([_rows(experiment) for experiment in experiments], ignore_index=True),
        set(),
    )
    for experiment in experiments:
        best = experiment.best_trial()
        winners |= set() if best is None else {(experiment.directory, best["run_dir"])}
    done = Status.COMPLETE.value
    table = _table(
        columns,
        rows,
        lambda row: (row["directory"], row["run_dir"]) in winners,
        lambda row: row["status"] != done,
    )
    return _said_once(table) if swept else table


def _said_once(table: Table) -> Table:
    values = {
        place: {row.cells[place] for row in table.rows} for place in range(len(table.columns))
    }
    once = [
        p
        for p, column in enumerate(table.columns)
        if column.title in SAID_ONCE and len(values[p]) == 1
    ]
    kept = [place for place in range(len(table.columns)) if place not in once]
    rows = [
        replace(
            row,
            cells=[row.cells[place] for place in kept],
            sort=[row.sort[place] for place in kept],
        )
        for row in table.rows
    ]
    same = labels.listed([f"{table.columns[place].title} {values[place].pop()}" for place in once])
    return Table([table.columns[place] for place in kept], rows, same)


def _inputs(
    experiments: Sequence[Experiment], of: Callable[[pd.Series], Iterable[Any]]
) -> list[Column]:
    """A column with the inputs that a row's runs were trained on, where those of any experiment
    changed.
    """
    if not any(experiment.inputs_changed for experiment in experiments):
        return []
    return [
        Column(
            "inputs",
            lambda row: ", ".join(sorted({str(one) for one in of(row) if pd.notna(one)})) or "–",
            words=True,
        )
    ]


def _rows(experiment: Experiment) -> pd.DataFrame:
    return experiment.tables.runs.assign(name=experiment.name)


def _table(
    columns: list[Column],
    rows: pd.DataFrame,
    best: Callable[[pd.Series], bool],
    muted: Callable[[pd.Series], bool],
) -> Table:
    filled = [
        Row(
            [column.cell(row) for column in columns],
            [column.key(row) for column in columns],
            bool(best(row)),
            bool(muted(row)),
            str(row.get("status") or ""),
            int(row["number"]) if pd.notna(row.get("number")) else None,
            row.get("command"),
        )
        for _, row in rows.iterrows()
    ]
    return Table(columns, filled)


def _count(title: str, name: str) -> Column:
    return Column(
        title, lambda row: "–" if pd.isna(row[name]) else str(int(row[name])), sort=number(name)
    )


def number(name: str) -> Callable[[pd.Series], Sort]:
    """What a column of numbers sorts by."""
    return lambda row: None if pd.isna(row[name]) else float(row[name])


def _axes(axes: Sequence[str]) -> list[Column]:
    return [
        Column(labels.key(key), _axis_cell(key), words=key == labels.TARGETS, sort=_axis_sort(key))
        for key in axes
    ]


def _axis_cell(key: str) -> Callable[[pd.Series], str]:
    def cell(row: pd.Series) -> str:
        rank = row.get(labels.RANK)
        values = {labels.RANK: None if pd.isna(rank) else rank}
        return (
            labels.value(key, None if pd.isna(row.get(key)) else row[key])
            if labels.matters(key, values)
            else "–"
        )

    return cell


def _settings(keys: Sequence[str]) -> Callable[[pd.Series], str]:
    def cell(row: pd.Series) -> str:
        known = {
            key: row[key] for key in keys if pd.notna(row.get(key)) and _axis_cell(key)(row) != "–"
        }
        return labels.settings(known) or "–"

    return cell


def _axis_sort(key: str) -> Callable[[pd.Series], Sort]:
    def sort(row: pd.Series) -> Sort:
        value = row.get(key)
        if pd.isna(value) or _axis_cell(key)(row) == "–":
            return None
        return value if isinstance(value, str) else float(value)

    return sort


def _score(experiment: Experiment) -> Callable[[Any], str]:
    return lambda given: _shown(experiment.metric, given)


def _shown(metric: str, given: Any) -> str:
    return labels.score(metric, None if pd.isna(given) else float(given))


def _peak(row: pd.Series) -> str:
    return (
        f"{_shown(row['metric'], row['best'])} ({row['best_step']})"
        if pd.notna(row["best_step"])
        else "–"
    )


def _final(row: pd.Series) -> str:
    if pd.notna(row["score"]):
        return _shown(row["metric"], row["score"])
    return f"({_shown(row['metric'], row['last'])})" if pd.notna(row["last"]) else "–"


def _duration(seconds: Any) -> str:
    return metrics.duration(float(seconds)) if pd.notna(seconds) else "–"


def _seeds(row: pd.Series, seeds: int) -> str:
    if seeds == 1:
        return str(row["statuses"]).removeprefix("1 ")
    return f"{row['n']} of {seeds}" + ("" if row["whole"] else f": {row['statuses']}")


def _status(row: pd.Series) -> str:
    status = str(row["status"]).lower()
    if not isinstance(row["reason"], str):
        return status
    reason = (
        row["reason"] if len(row["reason"]) <= SHOWN_REASON else f"{row['reason'][:SHOWN_REASON]} …"
    )
    return f"{status}: {reason}"


def _range(score: Callable[[Any], str], low: float, high: float) -> str:
    return f"{score(low)} to {score(high)}" if pd.notna(low) else "–"
