"""Show the scores side by side for each value of a swept key with a few values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.marks import base_line
from analysis.figures.drawing.theme import Look

MAX_VALUES = 8


@dataclass(frozen=True, slots=True)
class ByValueData:
    """`points` has value and score of the complete trials.

    By value, `means` has their mean and `tops` the mean of the best configuration.
    """

    key: str
    points: pd.DataFrame
    means: pd.Series
    tops: pd.Series
    base: float | None
    metric: str


def data(experiment: Experiment) -> list[Plot]:
    """Return a plot for each swept key but the learning rate, with 2 to 8 values that completed."""
    order = [labels.TARGETS, labels.RANK, labels.ALPHA]
    keys = [key for key in experiment.axes if key != labels.LR]
    keys.sort(key=lambda key: order.index(key) if key in order else len(order))
    metric, plots = experiment.metric, []
    for key in keys:
        done = _where_it_matters(experiment.complete, key)
        if not 2 <= done[key].nunique() <= MAX_VALUES:
            continue
        points = pd.DataFrame({"value": done[key], "score": done[metric]})
        points = points.sort_values(["value", "score"])
        whole = experiment.configurations[experiment.configurations["whole"]]
        ranked = _where_it_matters(whole, key).groupby(key)["mean"]
        tops = ranked.max() if experiment.direction == "maximize" else ranked.min()
        means = points.groupby("value")["score"].mean()
        plots.append(
            Plot(
                name=f"score_by_{key.replace('.', '_')}",
                title=f"Score by {labels.key(key)}",
                what=f"Strip chart of {labels.metric(metric)} by {labels.key(key)}: "
                f"{labels.plural(len(points), 'trial')}.",
                reading=_reading(experiment, key, tops, done[key].value_counts().to_dict()),
                data=ByValueData(key, points, means, tops, experiment.base, metric),
            )
        )
    return plots


def _where_it_matters(table: pd.DataFrame, key: str) -> pd.DataFrame:
    """Return the rows on which a key has an effect."""
    table = table.dropna(subset=[key])
    if labels.RANK not in table.columns:
        return table
    return table.loc[[labels.matters(key, {labels.RANK: rank}) for rank in table[labels.RANK]]]


def _reading(experiment: Experiment, key: str, tops: pd.Series, counts: dict[Any, int]) -> str:
    parts = []
    for value, top in tops.sort_values(ascending=experiment.direction == "minimize").items():
        name = labels.value(key, value) if isinstance(value, str) else labels.setting(key, value)
        trials = labels.plural(counts[value], "trial")
        parts.append(f"{labels.score(experiment.metric, top)} with {name} ({trials})")
    if not parts:
        return "No configuration has all its seeds complete."
    return (
        f"Best configuration of each: {labels.listed(parts)}. "
        "The means are over all complete trials, so other settings differ between them."
    )


def draw(chart: ByValueData, figure: Canvas, look: Look) -> None:
    """Draw a column for each value: trials, their mean, and the best configuration's mean."""
    axes, ink = figure.add_subplot(), look.colours["ink"]
    values = list(chart.means.index)
    jitter = np.random.default_rng(0)
    for place, value in enumerate(values):
        scores = chart.points.loc[chart.points["value"] == value, "score"].to_numpy()
        at = place + 0.18 * jitter.uniform(-1, 1, len(scores))
        axes.scatter(at, scores, s=26, color=look.first, alpha=0.65, linewidths=0, zorder=3)
        ends = place - 0.3, place + 0.3
        axes.hlines(chart.means[value], *ends, color=ink, linewidth=2, zorder=4)
        if value in chart.tops.index:
            hollow: dict[str, Any] = {"marker": "D", "facecolors": "none", "edgecolors": ink}
            axes.scatter(place, chart.tops[value], s=56, zorder=5, **hollow)
    base_line(axes, chart.base, chart.metric, look)
    names = [labels.value(chart.key, value) for value in values]
    axes.set_xticks(range(len(values)), [name.replace(", ", ",\n") for name in names])
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(labels.key(chart.key))
    axes.set_ylabel(labels.metric(chart.metric))
    trial: dict[str, Any] = {"color": look.first, "marker": "o", "linestyle": "", "alpha": 0.65}
    best: dict[str, Any] = {"color": ink, "marker": "D", "markerfacecolor": "none", "linestyle": ""}
    figure.legend(
        handles=[
            Line2D([], [], label="a trial", **trial),
            Line2D([], [], label="best configuration", **best),
            Line2D([], [], color=ink, linewidth=2, label="mean of trials"),
        ],
        loc="outside lower center" if look.narrow else "outside right upper",
        ncols=2 if look.narrow else 1,
        fontsize="small",
    )


FIGURE = Figure(order=30, data=data, draw=draw)
