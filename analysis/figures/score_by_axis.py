"""Score side by side for each value of an axis with a few values: target modules, rank,
alpha, ...
"""

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
from analysis.figures.drawing.theme import Look, base_line, category_styles

MAX_VALUES = 8


@dataclass(frozen=True, slots=True)
class Sides:
    """`points` has value, score of the complete trials; `means` and `tops` (best ranked
    configuration) go by value.
    """

    key: str
    points: pd.DataFrame
    means: pd.Series
    tops: pd.Series
    base: float | None
    metric: str


def data(experiment: Experiment) -> list[Plot]:
    """A plot per swept key with 2 to 8 values among the complete trials, the learning rate
    aside.
    """
    order = [labels.TARGETS, labels.RANK, labels.ALPHA]
    keys = sorted(
        (k for k in experiment.axes if k != labels.LR),
        key=lambda k: order.index(k) if k in order else 9,
    )
    plots = [_plot(experiment, key) for key in keys]
    return [plot for plot in plots if plot is not None]


def draw(sides: Sides, figure: Canvas, look: Look) -> None:
    """A column per value: points are trials, the bar their mean, the diamond the best
    configuration's mean.
    """
    axes = figure.add_subplot()
    colour = category_styles([0], look)[0][0]
    values = list(sides.means.index)
    jitter = np.random.default_rng(0)
    for place, value in enumerate(values):
        scores = sides.points.loc[sides.points["value"] == value, "score"].to_numpy()
        spread = 0.18 * jitter.uniform(-1, 1, len(scores))
        axes.scatter(place + spread, scores, s=26, color=colour, alpha=0.65, linewidths=0, zorder=3)
        axes.hlines(
            sides.means[value],
            place - 0.3,
            place + 0.3,
            color=look.colours["ink"],
            linewidth=2,
            zorder=4,
        )
        if value in sides.tops.index:
            ink = look.colours["ink"]
            axes.scatter(
                place,
                sides.tops[value],
                marker="D",
                s=56,
                facecolors="none",
                edgecolors=ink,
                zorder=5,
            )
    base_line(axes, sides.base, f"base\n{labels.score(sides.metric, sides.base)}", look)
    names = [labels.value(sides.key, value) for value in values]
    axes.set_xticks(range(len(values)), [name.replace(", ", ",\n") for name in names])
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(labels.key(sides.key))
    axes.set_ylabel(labels.metric(sides.metric))
    _legend(figure, colour, look)


def _legend(figure: Canvas, colour: str, look: Look) -> None:
    ink = look.colours["ink"]
    handles = [
        Line2D([], [], color=colour, marker="o", linestyle="", alpha=0.65, label="a trial"),
        Line2D(
            [],
            [],
            color=ink,
            marker="D",
            markerfacecolor="none",
            linestyle="",
            label="best configuration",
        ),
        Line2D([], [], color=ink, linewidth=2, label="mean of trials"),
    ]
    if look.narrow:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small")
    else:
        figure.legend(handles=handles, loc="outside right upper", fontsize="small")


def _plot(experiment: Experiment, key: str) -> Plot | None:
    metric, done = experiment.metric, _where_it_matters(experiment.complete, key)
    if not 2 <= done[key].nunique() <= MAX_VALUES:
        return None
    points = pd.DataFrame({"value": done[key], "score": done[metric]}).sort_values(
        ["value", "score"]
    )
    whole = experiment.configurations[experiment.configurations["whole"]]
    ranked = _where_it_matters(whole, key).groupby(key)["mean"]
    tops = ranked.max() if experiment.direction == "maximize" else ranked.min()
    sides = Sides(
        key, points, points.groupby("value")["score"].mean(), tops, experiment.base, metric
    )
    reading = _reading(sides, experiment.direction == "maximize", done)
    alt = (
        f"Strip chart of {labels.metric(metric)} by {labels.key(key)}: "
        f"{labels.plural(len(points), 'trial')}."
    )
    name, title = f"score_by_{key.replace('.', '_')}", f"Score by {labels.key(key)}"
    return Plot(name, title, reading, f"{alt} {reading}", sides)


def _where_it_matters(table: pd.DataFrame, key: str) -> pd.DataFrame:
    """Without full fine-tuning when the key is one that it ignores."""
    table = table.dropna(subset=[key])
    if labels.RANK not in table.columns:
        return table
    return table.loc[[labels.matters(key, {labels.RANK: rank}) for rank in table[labels.RANK]]]


def _reading(sides: Sides, maximize: bool, done: pd.DataFrame) -> str:
    order = sides.tops.sort_values(ascending=not maximize)
    counts = done[sides.key].value_counts()
    parts = [_part(sides, value, int(counts[value])) for value in order.index]
    if not parts:
        return "No configuration has all its seeds complete."
    best = f"Best configuration of each: {labels.listed(parts)}."
    return f"{best} The means are over all complete trials, so other settings differ between them."


def _part(sides: Sides, value: Any, count: int) -> str:
    top = labels.score(sides.metric, float(sides.tops[value]))
    name = (
        labels.value(sides.key, value)
        if isinstance(value, str)
        else labels.setting(sides.key, value)
    )
    return f"{top} with {name} ({labels.plural(count, 'trial')})"


FIGURE = Figure(order=30, data=data, draw=draw)
