"""Lay out the cells of a heatmap on log scales."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

# More learning rates than this are no grid: they are grouped by thirds of a decade.
MAX_RATES = 12
BINS = 3


def rate_columns(rates: pd.Series, rows: pd.Series) -> pd.Series:
    """Return the column of each rate: itself on a grid, else the middle of its bin."""
    exact = rates.map(lambda rate: float(f"{rate:.6g}")).astype(float)
    if exact.groupby(rows).nunique().max() <= MAX_RATES:
        return exact
    return exact.map(lambda rate: 10 ** (round(math.log10(rate) * BINS) / BINS))


def edges(places: list[float], alone: float = 1.0) -> list[tuple[float, float]]:
    """Return the borders of cells around places in order: halfway to the next.

    Room is left where the next is far away. `alone` is the width of a single cell.
    """
    gaps = np.diff(places)
    if not len(gaps):
        return [(place - alone / 2, place + alone / 2) for place in places]
    reach = np.minimum(gaps / 2, 0.75 * float(gaps.min()))
    left, right = np.append(reach[:1], reach), np.append(reach, reach[-1:])
    return [(place - a, place + b) for place, a, b in zip(places, left, right, strict=True)]


def octaves(values: list[float]) -> dict[float, float]:
    """Return the log2 of ranks or alphas; 0 (full fine-tuning) stands a step below the lowest."""
    places = {value: math.log2(value) for value in sorted(value for value in values if value)}
    steps = np.diff(list(places.values()))
    below = min(places.values(), default=0.0) - (float(steps.min()) if len(steps) else 1.0)
    return ({0.0: below if places else 0.0} if 0 in values else {}) | places
