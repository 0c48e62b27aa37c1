"""What several figures share: scores with their intervals, the part of an axis worth showing, which
runs compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from analysis.claims.evidence import Evidence
from analysis.data import labels
from analysis.experiment import Experiment
from harness.config import metrics

# How far beyond the scores, as a share of their span, the end of a wide interval still widens the
# axis.
REACH = 0.35


def agreeing(e: Evidence, runs: pd.DataFrame) -> str:
    """A sentence on which runs are compared, where not all are; else nothing."""
    if len(e.rank) == len(runs):
        return ""
    return f" Of {len(runs)} runs the {len(e.rank)} that agree in all other settings are compared."


def tuned(points: pd.DataFrame) -> str:
    """How many learning rates (`rates`) the arms had to choose their best from, and how sure their
    scores are.
    """
    few, many = int(points["rates"].min()), int(points["rates"].max())
    of = f"{few}" if few == many else f"{few} to {many}"
    seeds = int(points["seeds"].min())
    chance = (
        f"95% intervals over {seeds} seeds" if seeds > 1 else "with one seed chance is not known"
    )
    return f"each at the best of its {of} learning rates; {chance}"


def interval_marks(
    axes: Axes,
    places: Sequence[float] | NDArray[np.float64],
    points: pd.DataFrame,
    style: tuple[str, str],
) -> None:
    """`score` of each row as a mark with its interval from `low` to `high` as a line, none where
    they are NaN.
    """
    colour, marker = style
    ends = points[["low", "high"]].to_numpy(float)
    known = np.isfinite(ends).all(axis=1)
    axes.vlines(
        np.asarray(places)[known],
        ends[known, 0],
        ends[known, 1],
        color=colour,
        linewidth=1.6,
        zorder=3,
    )
    size = 90 if marker == "*" else 44  # a star has less to see
    axes.scatter(
        places, points["score"], marker=marker, s=size, color=colour, linewidths=0, zorder=4
    )


def fit_scores(axes: Axes, points: pd.DataFrame, base: float | None, metric: str) -> None:
    """Limit the vertical axis to the scores and the base, with what of their intervals is near; a
    share to 0 and 1.
    """
    scores = np.append(points["score"].to_numpy(float), [] if base is None else base)
    bottom, top = float(np.nanmin(scores)), float(np.nanmax(scores))
    span = max(top - bottom, 0.02 * max(abs(bottom), abs(top)), 1e-9)
    low, high = bottom - REACH * span, top + REACH * span
    ends = points[["low", "high"]].to_numpy(float)
    ends = np.clip(ends[np.isfinite(ends).all(axis=1)], low, high)
    low, high = (min(bottom, *ends[:, 0]), max(top, *ends[:, 1])) if len(ends) else (bottom, top)
    margin = 0.08 * (high - low if high > low else span)
    low, high = low - margin, high + margin
    if metrics.lookup(metric).unit == "share":
        low, high = max(low, -0.03), min(high, 1.03)
    axes.set_ylim(low, high)


def run_names(experiment: Experiment) -> dict[str, str]:
    """Return a name for each run, by its directory, for tooltips: its trial, swept settings and
    seed.
    """
    names = {}
    for _, run in experiment.tables.runs.iterrows():
        swept = labels.settings({key: run[key] for key in experiment.axes if pd.notna(run[key])})
        said = [swept, "" if pd.isna(run["seed"]) else f"seed {int(run['seed'])}"]
        name = "the run" if pd.isna(run["number"]) else f"trial {int(run['number'])}"
        names[str(run["run_dir"])] = f"{name}: {', '.join(part for part in said if part)}"
    return names
