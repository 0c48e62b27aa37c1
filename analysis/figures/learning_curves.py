"""Show the held-out score against steps, tokens, model FLOPs and seconds, a line per run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.marks import base_line, run_names
from analysis.figures.drawing.render import Trace
from analysis.figures.drawing.theme import Look, category_styles, rank_styles, status_style
from harness.config import metrics

# What a curve is drawn against, and its name on the axis.
COSTS = {
    "step": "optimizer steps",
    "tokens": "tokens",
    "flops": "model FLOPs",
    "seconds": "seconds",
}


@dataclass(frozen=True, slots=True)
class CurveData:
    """`lines`: run_dir, number, status, score, costs, shade (the learning rate, else a category).

    `costs` are the known ones of step, tokens, flops and seconds; with `packed` the seconds are a
    pack's. `shade` is the key of the colours; `names` has a name for each run by its run_dir.
    """

    lines: pd.DataFrame
    costs: tuple[str, ...]
    shade: str | None
    base: float | None
    best: str | None
    best_name: str | None
    metric: str
    packed: bool
    names: dict[str, str]


def data(experiment: Experiment) -> list[Plot]:
    """Return the curves of every run that was evaluated at least twice; none without any."""
    metric, trials, steps = experiment.metric, experiment.trials, experiment.tables.steps
    if metric not in steps.columns:
        return []
    lines = _lines(steps, metric)
    if lines.empty or lines.groupby("run_dir").size().max() < 2:
        return []
    keys = (labels.LR, labels.RANK, *experiment.axes)
    shade = next((key for key in keys if key in experiment.axes), None)
    shades = trials.set_index("run_dir")[shade] if shade else pd.Series(dtype=object)
    lines["shade"] = lines["run_dir"].map(shades)
    best = experiment.best_trial()
    members = steps.get("perf/members")
    chart = CurveData(
        lines=lines,
        costs=tuple(cost for cost in COSTS if lines[cost].max() > 0),
        shade=shade,
        base=experiment.base,
        best=None if best is None else str(best["run_dir"]),
        best_name=f"trial {best['number']}, the best"
        if best is not None and experiment.is_sweep
        else None,
        metric=metric,
        packed=members is not None and bool((members > 1).any()),
        names=run_names(experiment),
    )
    what = (
        f"Line charts of {labels.metric(metric)} against "
        f"{labels.listed([COSTS[cost] for cost in chart.costs])}, "
        f"{labels.plural(lines['run_dir'].nunique(), 'run')}."
    )
    reading = _reading(experiment, chart)
    return [Plot("learning_curves", "Learning curves", what, reading, chart)]


def _lines(steps: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the evaluations with what each run had used by then.

    A step without a count has its last known one.
    """
    table = steps.sort_values(["number", "run_dir", "step"], kind="stable").reset_index(drop=True)
    tokens = table.get("num_tokens", pd.Series(float("nan"), index=table.index))
    used = pd.DataFrame({"tokens": tokens, "flops": table["flops"], "seconds": table["seconds"]})
    used = used.astype(float).groupby(table["run_dir"]).ffill()
    # The base is evaluated before anything is used; a count that was never logged stays unknown.
    used = used.mask(used.isna() & (table["step"] == 0).to_numpy()[:, None], 0.0)
    lines = pd.concat([table[["run_dir", "number", "status", "step", metric]], used], axis=1)
    return lines.dropna(subset=[metric]).rename(columns={metric: "score"}).reset_index(drop=True)


def _reading(experiment: Experiment, chart: CurveData) -> str:
    best, metric = experiment.best_trial(), chart.metric
    if best is None:
        if experiment.is_sweep:
            return "No configuration has all its seeds complete."
        return "The run has not completed."
    line = chart.lines[chart.lines["run_dir"] == best["run_dir"]].sort_values("step")
    who = f"Trial {best['number']}" if experiment.is_sweep else "The run"
    if line.empty:
        return f"{who} is the best, but its steps cannot be read."
    final, last = float(line["score"].iloc[-1]), line.iloc[-1]
    if experiment.base is None or not experiment.better(final, experiment.base):
        return f"{who} ends at {labels.score(metric, final)} and does not rise above the base."
    half = experiment.base + (final - experiment.base) / 2
    reached = line[[not experiment.better(half, score) for score in line["score"]]].iloc[0]
    text = (
        f"{who} has half of its gain by step {reached['step']}{_spent(chart, reached)}, and ends "
        f"at {labels.score(metric, final)} after {last['step']}{_spent(chart, last)}"
    )
    peak, at = float(best[f"best/{metric}"]), int(best["best/step"])
    if experiment.better(peak, final):
        text += f"; its best evaluation was {labels.score(metric, peak)} at step {at}"
    return text + "."


def _spent(chart: CurveData, row: pd.Series) -> str:
    """Say in brackets what a run had used at an evaluation."""
    words: dict[str, Callable[[float], str]] = {
        "tokens": lambda used: f"{EngFormatter(sep='', places=0)(used)} tokens",
        "flops": lambda used: f"{used:.1e} FLOPs".replace("e+", "e"),
        "seconds": lambda used: metrics.duration(used) + (" of its pack's" if chart.packed else ""),
    }
    costs = [cost for cost in chart.costs if cost in words and row[cost] > 0]
    return f" ({', '.join(words[cost](float(row[cost])) for cost in costs)})" if costs else ""


def draw(chart: CurveData, figure: Canvas, look: Look) -> list[Trace]:
    """Draw a panel for each cost, with a coloured line for each run; the best is thick."""
    count = len(chart.costs)
    columns = 1 if look.narrow or count == 1 else 2
    rows = -(-count // columns)
    figure.set_size_inches(look.size[0], look.size[1] if count == 1 else 2.3 * rows + 1.4)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    colour_of = _colours(chart, figure, list(panels), look)
    traces = []
    for place, (cost, axes) in enumerate(zip(chart.costs, panels, strict=False)):
        traces += _panel(axes, chart, cost, colour_of, look)
        last = (place + 1) % columns == 0 or place == count - 1
        base_line(axes, chart.base, chart.metric, look, named=last)
    for axes in panels[count:]:
        axes.set_visible(False)
    figure.supylabel(labels.metric(chart.metric), fontsize="medium", color=look.colours["ink"])
    return traces


def _panel(
    axes: Axes, chart: CurveData, cost: str, colour_of: Callable[[Any], Any], look: Look
) -> list[Trace]:
    name, traces = labels.metric(chart.metric), []
    for run_dir, line in chart.lines.dropna(subset=[cost]).groupby("run_dir"):
        style, marker = status_style(str(line["status"].iloc[0]))
        colour, best = colour_of(line["shade"].iloc[0]), run_dir == chart.best
        used, scores = line[cost].astype(float).tolist(), line["score"].tolist()
        width, front = (2.2, 4) if best else (1.0, 3)
        axes.plot(used, scores, style, color=colour, linewidth=width, zorder=front)
        if best and chart.best_name:
            axes.plot(used, scores, color=look.colours["ink"], linewidth=4.4, zorder=3.9)
        if marker:
            hollow: dict[str, Any] = {"markerfacecolor": "none", "markersize": 6, "zorder": 5}
            axes.plot(used[-1:], scores[-1:], marker, color=colour, **hollow)
        texts = [
            f"step {step}: {name} {labels.score(chart.metric, score)}"
            for step, score in zip(line["step"], scores, strict=True)
        ]
        traces.append(Trace(chart.names[str(run_dir)], texts, used, scores, axes.transData))
    whose = " (of the whole pack)" if cost == "seconds" and chart.packed else ""
    axes.set_xlabel(COSTS[cost] + whose)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4 if look.narrow else 6))
    if cost == "flops":
        axes.xaxis.set_major_formatter(FuncFormatter(_power))
    elif cost != "step":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return traces


def _power(value: float, _: int) -> str:
    return f"{value:.1e}".replace(".0e", "e").replace("e+", "e") if value else "0"


def _colours(
    chart: CurveData, figure: Canvas, panels: list[Axes], look: Look
) -> Callable[[Any], Any]:
    """Return the colour of each shade, and draw its legend or colour bar."""
    handles = []
    if chart.best_name:
        ink = look.colours["ink"]
        handles.append(Line2D([], [], color=ink, linewidth=4.4, label=chart.best_name))
    for status in ("PRUNED", "RUNNING", "FAILED"):
        if status in set(chart.lines["status"]):
            dashes, marker = status_style(status)
            style: dict[str, Any] = {
                "linestyle": dashes,
                "marker": marker,
                "markerfacecolor": "none",
            }
            soft = look.colours["soft"]
            handles.append(Line2D([], [], color=soft, label=status.lower(), **style))
    wide_columns = 5
    if chart.shade == labels.LR:
        rates = chart.lines["shade"].astype(float)
        scale = ScalarMappable(LogNorm(rates.min(), rates.max()), look.sequence)
        side: Any = "bottom" if look.narrow else "right"
        shape: dict[str, Any] = {"pad": 0.02, "aspect": 30 if look.narrow else 40}
        bar = figure.colorbar(
            scale,
            ax=panels,
            label="learning rate",
            location=side,
            format=FuncFormatter(lambda rate, _: labels.lr(rate)),
            ticks=LogLocator(subs=(1.0,) if look.narrow else (1.0, 3.0)),
            **shape,
        )
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        wide_columns = 4

        def colour_of(shade: Any) -> Any:
            return scale.to_rgba(np.asarray(float(shade)))

    else:
        values = sorted(chart.lines["shade"].dropna().unique())
        of_ranks = chart.shade == labels.RANK
        styles = rank_styles(values, look) if of_ranks else category_styles(values, look)
        if chart.shade:
            names = {value: labels.setting(chart.shade, value) for value in values}
            shades = [Line2D([], [], color=styles[v][0], label=name) for v, name in names.items()]
            handles = shades + handles

        def colour_of(shade: Any) -> Any:
            return styles.get(shade, (look.first, ""))[0]

    if handles:
        columns = 2 if look.narrow else wide_columns
        figure.legend(handles=handles, loc="outside upper center", ncols=columns, fontsize="small")
    return colour_of


FIGURE = Figure(order=20, data=data, draw=draw, front=True, dark_apart=True)
