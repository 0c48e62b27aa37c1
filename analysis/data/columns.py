"""Validation of the report's tables: the allowed values of each column, and errors that name the
first other one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype, is_scalar

from analysis.data import rows, sources
from analysis.data.labels import ALPHA, LR, RANK
from analysis.data.records import SHARES, STATUSES, rewards_are_shares, wrong_types
from harness.config import metrics
from harness.core.cli import invocation
from harness.core.errors import UserError

_TEXTS = {
    "runs": (*rows.KEY, *rows.WORDS),
    "steps": (*rows.KEY, "status"),
    "samples": (*rows.KEY, "phase", "question", "ground_truth", "completion"),
    "sources": sources.WORDS,
}
_WHOLE = {
    "runs": rows.WHOLE,
    "steps": ("number", "configuration", "seed", "step", "episodes"),
    "samples": ("number", "configuration", "seed", "step", "index"),
    "sources": ("problems",),
}
_REAL = {
    "runs": rows.REAL,
    "steps": ("flops", "seconds"),
    "samples": ("reward",),
    "sources": sources.REAL,
}
_FLAGS = {
    "runs": rows.FLAGS,
    "steps": ("confirm",),
    "samples": ("confirm",),
    "sources": ("maximize",),
}
# Without these a row belongs to nothing.
_NEVER_EMPTY = (*rows.KEY, "step")
_METRICS = {"score", "base", "best", "last"}


def check(name: str, table: pd.DataFrame, file: Path) -> None:
    """Raise UserError naming file, row, column and value where a table (`runs`, `steps`, …) holds
    what it may not.
    """
    for column in map(str, table.columns):
        allowed, holds = _kind(name, column, table)
        values = table[column]
        may_be_empty = column not in _NEVER_EMPTY or (name == "runs" and column == "step")
        _refuse_first(values, _held(values, holds) | (values.isna() & may_be_empty), allowed, file)


def check_sources(table: pd.DataFrame, file: Path) -> None:
    """Raise UserError where a directory's manifest or seeds are not what a page is made from."""
    for column, allowed, fault in (
        ("manifest", "a manifest as JSON", lambda found: next(wrong_types(found), None)),
        (
            "seeds",
            "a list of whole numbers as JSON",
            lambda found: None if all(map(_is_whole, found)) else "no seeds",
        ),
    ):
        kind = dict if column == "manifest" else list
        for number, text in enumerate(table[column], 1):
            try:
                found = json.loads(text)
                why = fault(found) if isinstance(found, kind) else f"{type(found).__name__}"
            except (TypeError, ValueError, RecursionError) as error:
                why = str(error)
            if why is not None:
                raise _error(f"{file}, row {number}, column {column}: {why}", allowed)


def check_shares(
    tables: dict[str, pd.DataFrame], recipes: dict[str, dict[str, Any]], folder: Path
) -> None:
    """Raise UserError for an accuracy that is no share although every reward of its directory is
    one.
    """
    runs, steps, samples = (tables[name] for name in ("runs", "steps", "samples"))
    for directory, recipe in recipes.items():
        own = [part.loc[part["directory"] == directory] for part in (steps, samples)]
        ends = [
            end
            for part in own
            if "reward" in part
            for end in (part["reward"].min(), part["reward"].max())
        ]
        if not rewards_are_shares(recipe, ends):
            continue
        for name, table in (("runs", runs), ("steps", steps)):
            here = table["directory"] == directory
            for column in map(str, table.columns):
                judged = (
                    here & table["metric"].map(_is_share)
                    if name == "runs" and column in _METRICS
                    else here
                )
                if _is_share(column) or (name == "runs" and column in _METRICS):
                    good = (
                        table[column].astype(float).between(0, 1) | table[column].isna() | ~judged
                    )
                    _refuse_first(
                        table[column],
                        good,
                        "0 to 1, as its rewards are",
                        folder / f"{name}.parquet",
                    )


def _kind(name: str, column: str, table: pd.DataFrame) -> tuple[str, Callable[[Any], bool]]:
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
    if column in (*_WHOLE[name], RANK):
        return "a whole number", _is_whole
    if column in (*_REAL[name], LR, ALPHA) or name == "steps" or (name == "runs" and "/" in column):
        return "a finite number", _is_finite
    if name == "runs" and column in rows.param_columns(table):
        return "a number or text", lambda value: isinstance(value, str) or _is_finite(value)
    return "anything", _is_anything


def _held(values: pd.Series, holds: Callable[[Any], bool]) -> pd.Series:
    """Which values a test holds for; those of a column of numbers together, for a table of steps
    has many.
    """
    if holds in (_is_finite, _is_whole) and is_numeric_dtype(values) and not is_bool_dtype(values):
        numbers = values.to_numpy(float, na_value=math.nan)
        whole = numbers == np.floor(numbers) if holds is _is_whole else True
        return pd.Series(np.isfinite(numbers) & whole, index=values.index)
    if holds is _is_anything or (holds is _is_text and isinstance(values.dtype, pd.StringDtype)):
        return values.notna()
    return values.map(holds, na_action="ignore").eq(True).fillna(False).astype(bool)


def _refuse_first(values: pd.Series, good: pd.Series, allowed: str, file: Path) -> None:
    if bool(good.all()):
        return
    place = int(np.flatnonzero(~good.to_numpy(bool))[0])
    raise _error(
        f"{file}, row {place + 1}, column {values.name}: {_shown(values.iloc[place])}", allowed
    )


def _error(got: str, allowed: str) -> UserError:
    return UserError(
        "a table is damaged",
        got=got,
        allowed=allowed,
        fix=f"write it again: {invocation('report')} DIR",
    )


def _shown(value: Any) -> str:
    empty = is_scalar(value) and pd.isna(value)
    return (
        "nothing" if empty else repr(value.item() if isinstance(value, np.generic) else value)[:100]
    )


def _is_anything(_: Any) -> bool:
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_finite(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(
        value, bool | np.bool
    )
    return real and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_finite(value) and float(value).is_integer()


def _is_share(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(SHARES)


def _is_metric(name: Any) -> bool:
    try:
        return isinstance(name, str) and bool(metrics.direction(name))
    except UserError:
        return False
