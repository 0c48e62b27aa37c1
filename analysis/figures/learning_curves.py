"""Held-out score against training step, a line per trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from analysis import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.theme import Look, base_line, category_styles, status_style


@dataclass(frozen=True, slots=True)
class Curves:
    """`lines` has run_dir, number, status, step, score, shade: the learning rate when `log`, else a category."""

    lines: pd.DataFrame
    shade: str | None
    log: bool
    base: float | None
    best: str | None
    best_name: str | None
    metric: str


def data(experiment: Experiment) -> list[Plot]:
    """The curves of every run that evaluated at least twice; none when no run did."""
    metric, trials = experiment.metric, experiment.trials
    if metric not in experiment.steps.columns:
        return []
    shade = next((key for key in (labels.LR, labels.RANK, *experiment.axes) if key in experiment.axes), None)
    lines = experiment.steps.dropna(subset=[metric])[["run_dir", "number", "status", "step", metric]]
    lines = lines.rename(columns={metric: "score"})
    shades = trials.set_index("run_dir")[shade] if shade else pd.Series(dtype=object)
    lines["shade"] = lines["run_dir"].map(shades)
    if lines.groupby("run_dir").size().max() < 2 or lines.empty:
        return []
    best = experiment.best_trial()
    run_dir = None if best is None else str(best["run_dir"])
    name = f"trial {best['number']}, the best" if best is not None and experiment.is_sweep else None
    curves = Curves(lines, shade, shade == labels.LR, experiment.base, run_dir, name, metric)
    what = f"{labels.metric(metric)} against training step, {labels.plural(lines['run_dir'].nunique(), 'run')}"
    reading = _reading(experiment, lines)
    return [Plot("learning_curves", "Learning curves", reading, f"Line chart of {what}. {reading}", curves)]


def draw(curves: Curves, figure: Canvas, look: Look) -> None:
    """One line a run, coloured by learning rate (log scale) or category; the best is thick and named."""
    axes = figure.add_subplot()
    colour_of = _colours(curves, figure, look)
    for run_dir, line in curves.lines.groupby("run_dir"):
        style, marker = status_style(str(line["status"].iloc[0]))
        colour, best = colour_of(line["shade"].iloc[0]), run_dir == curves.best
        steps, scores = line["step"].astype(int).tolist(), line["score"].tolist()
        axes.plot(steps, scores, style, color=colour, linewidth=2.2 if best else 1.2, zorder=4 if best else 3)
        if best and curves.best_name:
            axes.plot(steps, scores, color=look.colours["ink"], linewidth=4.4, zorder=3.9)
        if marker:
            axes.plot(steps[-1:], scores[-1:], marker, color=colour, markerfacecolor="none", markersize=6, zorder=5)
    base_line(axes, curves.base, f"base\n{labels.score(curves.metric, curves.base)}", look)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(labels.metric(curves.metric))
    axes.set_xlim(left=0)


def _colours(curves: Curves, figure: Canvas, look: Look) -> Any:
    axes = figure.axes[0]
    handles = []
    if curves.best_name:
        handles = [Line2D([], [], color=look.colours["ink"], linewidth=4.4, label=curves.best_name)]
    ended = [s for s in ("PRUNED", "RUNNING", "FAILED") if s in set(curves.lines["status"])]
    handles += [_status_handle(status, look) for status in ended]
    if curves.log:
        rates = curves.lines["shade"].astype(float)
        scale = ScalarMappable(LogNorm(rates.min(), rates.max()), look.sequence)
        words = FuncFormatter(lambda rate, _: labels.lr(rate))
        ticks = LogLocator(subs=(1.0,) if look.narrow else (1.0, 3.0))
        place: Any = "bottom" if look.narrow else "right"
        bar = figure.colorbar(scale, ax=axes, label="learning rate", location=place, format=words, ticks=ticks)
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        if handles:
            figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize="small")
        return lambda shade: scale.to_rgba(np.asarray(float(shade)))
    values = sorted(curves.lines["shade"].dropna().unique())
    styles = category_styles(values, look)
    if curves.shade:
        name = curves.shade
        handles = [Line2D([], [], color=styles[v][0], label=labels.setting(name, v)) for v in values] + handles
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=2 if look.narrow else 5, fontsize="small")
    default = category_styles([0], look)[0]
    return lambda shade: styles.get(shade, default)[0]


def _status_handle(status: str, look: Look) -> Line2D:
    style, marker = status_style(status)
    ink = look.colours["soft"]
    return Line2D([], [], color=ink, linestyle=style, marker=marker, markerfacecolor="none", label=status.lower())


def _reading(experiment: Experiment, lines: pd.DataFrame) -> str:
    best = experiment.best_trial()
    if best is None:
        return "No configuration has all its seeds complete." if experiment.is_sweep else "The run has not completed."
    metric = experiment.metric
    line = lines[lines["run_dir"] == best["run_dir"]].sort_values("step")
    who = f"Trial {best['number']}" if experiment.is_sweep else "The run"
    if line.empty:
        return f"{who} is the best, but its steps cannot be read."
    final = float(line["score"].iloc[-1])
    if experiment.base is None or not experiment.better(final, experiment.base):
        return f"{who} ends at {labels.score(metric, final)} and does not rise above the base."
    half = experiment.base + (final - experiment.base) / 2
    reached = next(int(s) for s, v in zip(line["step"], line["score"], strict=True) if not experiment.better(half, v))
    peak, at = float(best[f"best/{metric}"]), int(best["best/step"])
    text = f"{who} has half of its gain by step {reached} and ends at {labels.score(metric, final)}"
    if experiment.better(peak, final):
        text += f" (its best evaluation was {labels.score(metric, peak)} at step {at})"
    return text + "."


FIGURE = Figure(order=20, data=data, draw=draw)
