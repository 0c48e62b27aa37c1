"""Define the columns of the report's tables, and check tables that are read from disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype, is_scalar

from analysis.data.labels import ALPHA, LR, RANK
from analysis.data.records import SHARES, STATUSES, parse_recipe, rewards_are_shares, wrong_types
from harness.config import metrics
from harness.core.cli import invocation
from harness.core.errors import UserError

# These identify a run in every table.
KEY = ["directory", "run_dir"]
IDENTITY = ("number", "configuration", "seed", "status", "confirm")
# What a run or step used; the table of steps has these beside the logged metrics.
COSTS = ("episodes", "flops", "seconds")
# The columns of the table of runs by type, besides directory, swept keys and final metrics.
RUN_INTEGERS = (
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
RUN_NUMBERS = (
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
RUN_TEXTS = (
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
RUN_FLAGS = ("full", "confirm", "diverged", "maximize")
RUN_COLUMNS = (*RUN_INTEGERS, *RUN_NUMBERS, *RUN_TEXTS, *RUN_FLAGS)
SAMPLE_COLUMNS = ("step", "phase", "index", "question", "ground_truth", "completion", "reward")
SOURCE_TEXTS = (
    "directory",
    "name",
    "kind",
    "status",
    "reason",
    "metric",
    "seeds",
    "manifest",
    "recipe",
)
SOURCE_NUMBERS = ("seconds", "created", "started", "ended")
SOURCE_COLUMNS = (*SOURCE_TEXTS, "maximize", "problems", *SOURCE_NUMBERS)
# The columns that a report cannot do without.
NEEDED = {
    "runs": [*KEY, *IDENTITY, "metric", "score", "command", "best_step"],
    "steps": [*KEY, *IDENTITY, "step"],
    "samples": [*KEY, "seed", *SAMPLE_COLUMNS],
    "sources": list(SOURCE_COLUMNS),
}
_TEXTS = {
    "runs": (*KEY, *RUN_TEXTS),
    "steps": (*KEY, "status"),
    "samples": (*KEY, "phase", "question", "ground_truth", "completion"),
    "sources": SOURCE_TEXTS,
}
_INTEGERS = {
    "runs": RUN_INTEGERS,
    "steps": ("number", "configuration", "seed", "step", "episodes"),
    "samples": ("number", "configuration", "seed", "step", "index"),
    "sources": ("problems",),
}
_NUMBERS = {
    "runs": RUN_NUMBERS,
    "steps": ("flops", "seconds"),
    "samples": ("reward",),
    "sources": SOURCE_NUMBERS,
}
_FLAGS = {
    "runs": RUN_FLAGS,
    "steps": ("confirm",),
    "samples": ("confirm",),
    "sources": ("maximize",),
}
_NEVER_EMPTY = (*KEY, "step")
# Columns of the table of runs whose values are those of its metric.
_OF_METRIC = {"score", "base", "best", "last"}


def param_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns that are swept recipe keys: dotted, while metrics have slashes."""
    return [name for name in table.columns if "." in name and "/" not in name]


def check_tables(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Raise UserError naming file, row, column and value of the first value that is not allowed."""
    for name, table in tables.items():
        file = folder / f"{name}.parquet"
        for column in map(str, table.columns):
            allowed, test = _allowed(name, column, table)
            values = table[column]
            may_be_empty = column not in _NEVER_EMPTY or (name == "runs" and column == "step")
            _refuse(values, _passes(values, test) | (values.isna() & may_be_empty), allowed, file)
    sources = folder / "sources.parquet"
    for number, (_, source) in enumerate(tables["sources"].iterrows(), 1):
        manifest, seeds = ("a manifest as JSON", dict), ("a list of whole numbers as JSON", list)
        for column, (allowed, kind) in {"manifest": manifest, "seeds": seeds}.items():
            if error := _json_error(source[column], kind):
                raise _damaged(f"{sources}, row {number}, column {column}: {error}", allowed)
        _check_shares(tables, source, folder)


def _json_error(text: Any, kind: type) -> str | None:
    """Return what is wrong with a manifest (a dict) or a list of seeds in JSON."""
    try:
        value: Any = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    if type(value).__name__ != kind.__name__:
        return type(value).__name__
    if kind is dict:
        return next(wrong_types(value), None)
    return None if all(map(_is_whole, value)) else "no seeds"


def _check_shares(tables: dict[str, pd.DataFrame], source: pd.Series, folder: Path) -> None:
    """Raise UserError for an accuracy outside 0 to 1 where every reward of the directory is."""
    here = {name: table["directory"] == source["directory"] for name, table in tables.items()}
    rewards = [
        tables[name].loc[here[name], "reward"].agg(["min", "max"])
        for name in ("steps", "samples")
        if "reward" in tables[name]
    ]
    recipe = parse_recipe(source["recipe"] or "")
    if not rewards_are_shares(recipe, [end for ends in rewards for end in ends]):
        return
    for name in ("runs", "steps"):
        table = tables[name]
        for column in map(str, table.columns):
            judged = here[name]
            if name == "runs" and column in _OF_METRIC:
                judged = judged & table["metric"].map(_is_share)
            elif not _is_share(column):
                continue
            values = table[column].astype(float)
            good = values.between(0, 1) | values.isna() | ~judged
            _refuse(table[column], good, "0 to 1, as its rewards are", folder / f"{name}.parquet")


def _allowed(name: str, column: str, table: pd.DataFrame) -> tuple[str, Callable[[Any], bool]]:
    """Return a column's allowed values, in words and as a test of one value."""
    if column == "status":
        return f"one of {', '.join(STATUSES)}", lambda value: value in STATUSES
    if column == "metric":
        return "a metric that has a better end", _is_metric
    if column == "kind" and name == "sources":
        return "sweep or run", lambda value: value in ("sweep", "run")
    if column in _TEXTS[name]:
        return "text", _is_text
    if column in _FLAGS[name]:
        return "true or false", lambda value: isinstance(value, bool | np.bool)
    if column in (*_INTEGERS[name], RANK):
        return "a whole number", _is_whole
    if column in (*_NUMBERS[name], LR, ALPHA) or name == "steps":
        return "a finite number", _is_finite
    if name == "runs" and "/" in column:
        return "a finite number", _is_finite
    if name == "runs" and column in param_columns(table):
        return "a number or text", lambda value: isinstance(value, str) or _is_finite(value)
    return "anything", _is_anything


def _passes(values: pd.Series, test: Callable[[Any], bool]) -> pd.Series:
    """Return which values pass a test; numeric columns are tested as a whole, for speed."""
    if test in (_is_finite, _is_whole) and is_numeric_dtype(values) and not is_bool_dtype(values):
        numbers = values.to_numpy(float, na_value=math.nan)
        whole = numbers == np.floor(numbers) if test is _is_whole else True
        return pd.Series(np.isfinite(numbers) & whole, index=values.index)
    if test is _is_anything or (test is _is_text and isinstance(values.dtype, pd.StringDtype)):
        return values.notna()
    return values.map(test, na_action="ignore").eq(True).fillna(False).astype(bool)


def _refuse(values: pd.Series, good: pd.Series, allowed: str, file: Path) -> None:
    """Raise UserError for the first value that is not good."""
    if bool(good.all()):
        return
    place = int(np.flatnonzero(~good.to_numpy(bool))[0])
    value = values.iloc[place]
    shown = repr(value.item() if isinstance(value, np.generic) else value)[:100]
    if is_scalar(value) and pd.isna(value):
        shown = "nothing"
    raise _damaged(f"{file}, row {place + 1}, column {values.name}: {shown}", allowed)


def _damaged(got: str, allowed: str) -> UserError:
    fix = f"write it again: {invocation('report')} DIR"
    return UserError("a table is damaged", got=got, allowed=allowed, fix=fix)


def _is_anything(_: Any) -> bool:
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating)
    return number and not isinstance(value, bool | np.bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_finite(value) and float(value).is_integer()


def _is_share(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(SHARES)


def _is_metric(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(metrics.direction(name))
    except UserError:
        return False
