"""Parallel coordinates: every trial as a line through its settings to its score, coloured by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from analysis import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.theme import Look

Floats = NDArray[np.float64]
# More axes than this cannot be told apart on a narrow page.
MAX_AXES = 6
# What is called the best: this share of the trials, but no fewer than three.
BEST_SHARE, FEWEST_BEST = 0.1, 3
# An axis with more values than this is a scale with ticks, not a row of names.
MAX_NAMES = 8
SHADES = 24
LOG_SPAN = 50
# Width of the bundle at a name, in distances between names; of a letter, in inches.
SPREAD, LETTER = 0.35, 0.07


@dataclass(frozen=True, slots=True)
class Lines:
    """`trials`: a column per key, score (NaN unless COMPLETE), configuration, best (of the winner);
    best last.
    """

    keys: tuple[str, ...]
    trials: pd.DataFrame
    metric: str
    maximize: bool


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis: each trial's place on it, 0 at the bottom to 1, NaN without a value, and its ticks
    with names.
    """

    places: pd.Series
    ticks: list[tuple[float, str]]


def data(experiment: Experiment) -> list[Plot]:
    """Every trial, when two keys were swept and two trials have a score."""
    runs = experiment.tables.runs
    keys = tuple(experiment.axes)
    swept = runs[~runs["confirm"].astype(bool)]
    if len(keys) < 2 or swept["score"].notna().sum() < 2:
        return []
    maximize = experiment.direction == "maximize"
    best = experiment.best.configuration if experiment.best else None
    trials = swept[[*keys, "score", "configuration"]].assign(
        best=(swept["configuration"] == best).fillna(False)
    )
    full = runs.loc[trials.index, "full"].fillna(False).astype(bool)
    for key in keys:
        if not labels.matters(key, {labels.RANK: 0}):
            trials[key] = trials[key].mask(full)
    trials = trials.sort_values(
        ["best", "score"], ascending=[True, maximize], na_position="first", ignore_index=True
    )
    lines = Lines(keys, trials, experiment.metric, maximize)
    reading = _reading(lines)
    what = (
        f"{labels.plural(len(trials), 'trial')} through "
        f"{labels.plural(len(keys), 'setting')} to their score"
    )
    return [
        Plot(
            "parallel",
            "All trials at once",
            reading,
            f"Parallel coordinates of {what}. {reading}",
            lines,
        )
    ]


def draw(lines: Lines, figure: Canvas, look: Look) -> None:
    """A vertical axis per setting and one for the score; colour is the score, grey and dashed has
    none.
    """
    axes = figure.add_subplot()
    keys = lines.keys[:MAX_AXES]
    scales = [scale(key, lines.trials[key]) for key in keys]
    scores = lines.trials["score"].astype(float)
    low, high = float(scores.min()), float(scores.max())
    span = high - low or 1.0
    ticks = [
        (share, labels.score(lines.metric, low + share * span))
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    scales.append(Scale((scores - low) / span, ticks))
    _lines(axes, lines, scales, look)
    room = max(5, int(look.size[0] / len(scales) / LETTER))
    behind = {"facecolor": look.colours["paper"], "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for place, one in enumerate(scales):
        axes.axvline(place, color=look.colours["soft"], linewidth=0.8, zorder=5)
        for at, text in one.ticks:
            name = text if len(text) <= room else f"{text[: room - 1]}…"
            where: Any = {
                "xy": (place, at),
                "xytext": (3, 0),
                "textcoords": "offset points",
                "va": "center",
            }
            axes.annotate(name, **where, fontsize="small", zorder=6, bbox=behind)
    names = [labels.key(key) for key in keys]
    axes.set_xticks(range(len(scales)), [*(name.replace(" ", "\n") for name in names), "score"])
    axes.set_xlim(-0.05, len(scales) - 1 + (0.55 if look.narrow else 0.25))
    axes.set_ylim(-0.1, 1.1)
    axes.yaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", colors=look.colours["ink"], labelsize="small")


def _lines(axes: Axes, lines: Lines, scales: list[Scale], look: Look) -> None:
    """A line per trial through the axes it has a value on, the last of which colours it; the best's
    in front.
    """
    table = np.column_stack([one.places.to_numpy(float) for one in scales])
    paths = [
        np.column_stack([np.flatnonzero(np.isfinite(row)), row[np.isfinite(row)]]) for row in table
    ]
    best = lines.trials["best"].to_numpy(bool)
    ink, soft, dashes = look.colours["ink"], look.colours["soft"], (0, (3, 2))
    faint = min(1.0, max(0.3, 30 / len(paths)))
    lost = np.isnan(table[:, -1])
    axes.plot(
        *_joined(paths, lost),
        color=soft,
        linestyle=dashes,
        linewidth=0.8,
        alpha=0.6 * faint,
        zorder=2,
    )
    # One line for all of a shade: the page holds hundreds of trials.
    shades = np.round(table[:, -1] * SHADES)
    for shade in np.unique(shades[~lost]):
        colour = look.sequence(shade / SHADES)
        axes.plot(
            *_joined(paths, (shades == shade) & ~best),
            color=colour,
            linewidth=1.2,
            alpha=faint,
            zorder=3,
        )
        axes.plot(*_joined(paths, (shades == shade) & best), color=ink, linewidth=3.4, zorder=3.8)
        axes.plot(
            *_joined(paths, (shades == shade) & best), color=colour, linewidth=1.6, zorder=3.9
        )
    handles = []
    if best.any():
        handles.append(Line2D([], [], color=ink, linewidth=3.4, label="the best configuration"))
    if lost.any():
        handles.append(Line2D([], [], color=soft, linestyle=dashes, label="did not complete"))
    if handles and isinstance(axes.figure, Canvas):
        axes.figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize="small")


def _joined(paths: list[Floats], chosen: NDArray[np.bool_]) -> Floats:
    """Some paths `[n, 2]` as one `[2, N]`, with gaps between them."""
    gap = np.full((1, 2), math.nan)
    parts = [part for path, kept in zip(paths, chosen, strict=True) if kept for part in (path, gap)]
    return np.concatenate(parts).T if parts else np.empty((2, 0))


def scale(key: str, column: pd.Series) -> Scale:
    """A key's axis: few values as names at equal distances, many numbers as a scale (log where they
    span 50 times).
    """
    names = sorted(column.dropna().unique())
    if len(names) > MAX_NAMES and pd.api.types.is_numeric_dtype(column):
        return _numbers(key, column.astype(float))
    at = {value: place / max(1, len(names) - 1) for place, value in enumerate(names)}
    # Trials with the same value run side by side, in their order.
    groups = column.groupby(column)
    beside = (groups.cumcount() + 0.5) / groups.transform("size") - 0.5
    places = column.map(at).astype(float) + SPREAD / max(2, len(names)) * beside.astype(float)
    return Scale(places, [(at[value], labels.value(key, value)) for value in names])


def _numbers(key: str, values: pd.Series) -> Scale:
    log = values.min() > 0 and values.max() / values.min() >= LOG_SPAN
    seen = np.log10(values) if log else values
    low, span = float(seen.min()), float(seen.max() - seen.min())
    ticks = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * span
        ticks.append((share, labels.value(key, float(f"{10**value if log else value:.2g}"))))
    return Scale((seen - low) / span, ticks)


def _reading(lines: Lines) -> str:
    """What the best trials have in common, key by key; a key of which they have every value says
    nothing.
    """
    scored = lines.trials.dropna(subset=["score"])
    if scored["score"].nunique() == 1:
        return f"All {len(scored)} trials have the same score."
    places = scored["score"].rank(method="min", ascending=not lines.maximize)
    # Those with equal scores are as good as each other.
    top = scored[places <= max(FEWEST_BEST, round(BEST_SHARE * len(scored)))]
    narrowed = [
        words
        for key in lines.keys
        if (words := _narrowed(key, top[key].dropna(), scored[key].dropna()))
    ]
    of = f"The best {len(top)} of {len(scored)} trials"
    common = labels.listed(narrowed) if narrowed else "nothing in common that the others lack"
    drawn = (
        f" The first {MAX_AXES} of {len(lines.keys)} settings are drawn."
        if len(lines.keys) > MAX_AXES
        else ""
    )
    return f"{of} have {common}.{drawn}"


def _narrowed(key: str, top: pd.Series, every: pd.Series) -> str | None:
    values, all_values = sorted(top.unique()), sorted(every.unique())
    if not values or len(values) == len(all_values) or len(all_values) < 2:
        return None
    if len(all_values) > MAX_NAMES and pd.api.types.is_numeric_dtype(every):
        if values[0] == all_values[0] and values[-1] == all_values[-1]:
            return None
        ends = [
            labels.value(key, value)
            for value in (values[0], values[-1], all_values[0], all_values[-1])
        ]
        return f"{labels.key(key)} {ends[0]} to {ends[1]} (of {ends[2]} to {ends[3]})"
    words = labels.listed([labels.value(key, value) for value in values], "or")
    return f"{labels.key(key)} {words} (of {len(all_values)})"


FIGURE = Figure(order=65, data=data, draw=draw)
