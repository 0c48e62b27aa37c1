"""The configuration table's ranges as bars on one axis, with the base's place."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis.experiment import Experiment

# Room at either end of the axis, as a share of what it spans.
MARGIN = 0.04


@dataclass(frozen=True, slots=True)
class Bar:
    """A configuration's range, its mean and the base, each as a percentage of the axis; None where
    there is none.
    """

    low: float | None
    mean: float
    high: float | None
    base: float | None


def bars(experiment: Experiment) -> list[Bar | None]:
    """A bar per row of `experiment.configurations`; None for one without a score, or where all are
    equal.
    """
    table, base = experiment.configurations, experiment.base
    ends = [
        float(end) for end in table[["low", "mean", "high"]].to_numpy(float).ravel() if end == end
    ]
    ends += [] if base is None else [base]
    first, last = min(ends, default=0.0), max(ends, default=0.0)
    if not first < last:
        return [None] * len(table)
    room = MARGIN * (last - first)
    first, last = first - room, last + room

    def place(value: float | None) -> float | None:
        return (
            None
            if value is None or pd.isna(value)
            else round(100 * (float(value) - first) / (last - first), 1)
        )

    at = place(base)
    found = [
        (place(row["low"]), place(row["mean"]), place(row["high"])) for _, row in table.iterrows()
    ]
    return [None if mean is None else Bar(low, mean, high, at) for low, mean, high in found]
