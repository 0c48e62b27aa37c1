"""Configurations with what their runs were set to, and the best of them at each rate and value of
another setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from analysis.claims.evidence import Evidence, Mask, contexts
from analysis.data import labels
from analysis.experiment import Experiment

# More learning rates than these are not a grid: they are put together by thirds of a decade.
MAX_RATES = 12
BINS = 3


def configurations(experiment: Experiment) -> pd.DataFrame:
    """The configurations with a score, best first, by their mean: its columns, and rank, alpha and
    lr.
    """
    runs = experiment.tables.runs.dropna(subset=["configuration", "rank", "lr"])
    settings = runs.groupby("configuration")[["rank", "alpha", "lr"]].first()
    scores = experiment.configurations[
        ["configuration", "n", "whole", "mean", "low", "high", "source"]
    ]
    table = scores.merge(settings, left_on="configuration", right_index=True)
    table = table[table["n"] > 0].astype({"rank": int, "n": int, "lr": float, "alpha": float})
    # Sorted again: of `configurations` those without all their seeds come last, whatever their
    # mean.
    return table.sort_values(
        "mean", ascending=experiment.direction == "minimize", kind="stable", ignore_index=True
    )


def each(table: pd.DataFrame) -> Iterator[Any]:
    """The rows of a table, a value by its column's name."""
    yield from table.itertuples(index=False)


def rate_columns(rates: pd.Series, rows: pd.Series) -> pd.Series:
    """The column of a heatmap that each rate belongs to: itself on a grid, else the middle of its
    bin.
    """
    exact = rates.map(lambda rate: float(f"{rate:.6g}")).astype(float)
    if exact.groupby(rows).nunique().max() <= MAX_RATES:
        return exact
    return exact.map(lambda rate: 10 ** (round(math.log10(rate) * BINS) / BINS))


def edges(places: list[float], alone: float = 1.0) -> list[tuple[float, float]]:
    """The borders of cells around places in order: halfway to the next, with room left open where
    it is far off.

    `alone` is the width of a cell that has no other beside it.
    """
    gaps = np.diff(places)
    half = 0.75 * float(gaps.min()) if len(gaps) else alone / 2
    reach = np.minimum(gaps / 2, half)
    left, right = (
        (np.append(reach[:1], reach), np.append(reach, reach[-1:]))
        if len(gaps)
        else ([half], [half])
    )
    return [(place - a, place + b) for place, a, b in zip(places, left, right, strict=True)]


def besides(e: Evidence, stratum: Mask) -> str:
    """What else the runs of a stratum share, where the sweep has several of it."""
    several = {
        name: len(np.unique(column[np.isfinite(column)])) > 1
        for name, column in (("targets", e.targets), ("batch", e.batch))
    }
    targets = np.unique(e.targets[stratum])
    words = (
        f" on {e.target_names[int(targets[0])]}" if several["targets"] and len(targets) == 1 else ""
    )
    return words + (f" with batches of {e.batch[stratum][0]:g}" if several["batch"] else "")


def left_out(runs: pd.DataFrame) -> str:
    """A sentence on the runs that evidence leaves out, as they differ in what no claim varies;
    empty without any.
    """
    kept, known = contexts(runs)[:1], runs["context"].notna()
    others = int((known & ~runs["context"].isin(kept)).sum())
    are = "differs in other settings and does" if others == 1 else "differ in other settings and do"
    return (
        f" {labels.plural(others, 'run')} of {int(known.sum())} {are} not count." if others else ""
    )


def octaves(values: list[float]) -> dict[float, float]:
    """Where ranks or alphas stand: their log2; 0 (full fine-tuning) a step below the lowest."""
    known = sorted(value for value in values if value)
    places = {value: math.log2(value) for value in known}
    steps = np.diff(list(places.values()))
    below = (min(places.values()) - (float(steps.min()) if len(steps) else 1.0)) if places else 0.0
    return ({0.0: below} if 0 in values else {}) | places
