"""Held-out score against training steps, tokens, model FLOPs and seconds, a line per run."""

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
from analysis.figures.drawing.marks import run_names
from analysis.figures.drawing.theme import (
    Look,
    Trace,
    base_line,
    category_styles,
    rank_styles,
    status_style,
)
from harness.config import metrics

# What a curve is drawn against, and how it reads on its axis.
COSTS = {
    "step": "optimizer steps",
    "tokens": "tokens",
    "flops": "model FLOPs",
    "seconds": "seconds",
}


@dataclass(frozen=True, slots=True)
class Curves:
    """`lines` has run_dir, number, status, score, shade (the learning rate when `log`, else a
    category), and `costs`.

    `costs` are those of step, tokens, flops and seconds that are known; where runs were `packed`
    seconds are a pack's. `names` says what each run is, by its run_dir.
    """

    lines: pd.DataFrame
    costs: tuple[str, ...]
    shade: str | None
    log: bool
    base: float | None
    best: str | None
    best_name: str | None
    metric: str
    packed: bool
    names: dict[str, str]


def data(experiment: Experiment) -> list[Plot]:
    """The curves of every run that evaluated at least twice; none when no run did."""
    metric, trials = experiment.metric, experiment.trials
    if metric not in experiment.steps.columns:
        return []
    lines = _lines(experiment.tables.steps, metric)
    if lines.empty or lines.groupby("run_dir").size().max() < 2:
        return []
    shade = next(
        (key for key in (labels.LR, labels.RANK, *experiment.axes) if key in experiment.axes), None
    )
    lines["shade"] = lines["run_dir"].map(
        trials.set_index("run_dir")[shade] if shade else pd.Series(dtype=object)
    )
    best = experiment.best_trial()
    run_dir = None if best is None else str(best["run_dir"])
    name = f"trial {best['number']}, the best" if best is not None and experiment.is_sweep else None
    costs = tuple(cost for cost in COSTS if lines[cost].max() > 0)
    members = experiment.tables.steps.get("perf/members")
    packed = members is not None and bool((members > 1).any())
    curves = Curves(
        lines,
        costs,
        shade,
        shade == labels.LR,
        experiment.base,
        run_dir,
        name,
        metric,
        packed,
        run_names(experiment),
    )
    against = labels.listed([COSTS[cost] for cost in costs])
    what = (
        f"{labels.metric(metric)} against {against}, "
        f"{labels.plural(lines['run_dir'].nunique(), 'run')}"
    )
    reading = _reading(experiment, curves)
    return [
        Plot(
            "learning_curves",
            "Learning curves",
            reading,
            f"Line charts of {what}. {reading}",
            curves,
        )
    ]


def _lines(steps: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The evaluations, with what each run had used by then: of a step without a count, its last
    known one.
    """
    table = steps.sort_values(["number", "run_dir", "step"], kind="stable").reset_index(drop=True)
    tokens = (
        table["num_tokens"]
        if "num_tokens" in table.columns
        else pd.Series(float("nan"), index=table.index)
    )
    used = pd.DataFrame(
        {"tokens": tokens, "flops": table["flops"], "seconds": table["seconds"]}
    ).astype(float)
    used = used.groupby(table["run_dir"]).ffill()
    # The base is evaluated before anything is used; a count that never came stays unknown.
    used = used.mask(used.isna() & (table["step"] == 0).to_numpy()[:, None], 0.0)
    found = pd.concat([table[["run_dir", "number", "status", "step", metric]], used], axis=1)
    return found.dropna(subset=[metric]).rename(columns={metric: "score"}).reset_index(drop=True)


def draw(curves: Curves, figure: Canvas, look: Look) -> list[Trace]:
    """A panel per cost; one line a run, coloured by learning rate (log scale) or category; the best
    is thick.
    """
    count = len(curves.costs)
    columns = 1 if look.narrow or count == 1 else 2
    height = {1: look.size[1]}.get(count, 2.3 * -(-count // columns) + 1.4)
    figure.set_size_inches(look.size[0], height)
    panels = figure.subplots(-(-count // columns), columns, sharey=True, squeeze=False).ravel()
    colour_of = _colours(curves, figure, list(panels), look)
    traces = []
    for place, (cost, axes) in enumerate(zip(curves.costs, panels, strict=False)):
        traces += _panel(axes, curves, cost, colour_of, look)
        if (place + 1) % columns == 0 or place == count - 1:
            base_line(axes, curves.base, f"base\n{labels.score(curves.metric, curves.base)}", look)
        else:
            base_line(axes, curves.base, "", look)
    for axes in panels[count:]:
        axes.set_visible(False)
    figure.supylabel(labels.metric(curves.metric), fontsize="medium", color=look.colours["ink"])
    return traces


def _panel(
    axes: Axes, curves: Curves, cost: str, colour_of: Callable[[Any], Any], look: Look
) -> list[Trace]:
    name, traces = labels.metric(curves.metric), []
    for run_dir, line in curves.lines.dropna(subset=[cost]).groupby("run_dir"):
        style, marker = status_style(str(line["status"].iloc[0]))
        colour, best = colour_of(line["shade"].iloc[0]), run_dir == curves.best
        used, scores = line[cost].astype(float).tolist(), line["score"].tolist()
        axes.plot(
            used,
            scores,
            style,
            color=colour,
            linewidth=2.2 if best else 1.0,
            zorder=4 if best else 3,
        )
        if best and curves.best_name:
            axes.plot(used, scores, color=look.colours["ink"], linewidth=4.4, zorder=3.9)
        if marker:
            axes.plot(
                used[-1:],
                scores[-1:],
                marker,
                color=colour,
                markerfacecolor="none",
                markersize=6,
                zorder=5,
            )
        shown = zip(line["step"], scores, strict=True)
        texts = [
            f"step {step}: {name} {labels.score(curves.metric, score)}" for step, score in shown
        ]
        traces.append(Trace(curves.names[str(run_dir)], texts, used, scores, axes.transData))
    axes.set_xlabel(
        COSTS[cost] + (" (of the whole pack)" if cost == "seconds" and curves.packed else "")
    )
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4 if look.narrow else 6))
    if cost != "step":
        axes.xaxis.set_major_formatter(
            EngFormatter(sep="") if cost != "flops" else FuncFormatter(_power)
        )
    return traces


def _power(value: float, _: int) -> str:
    return f"{value:.1e}".replace(".0e", "e").replace("e+", "e") if value else "0"


def _colours(
    curves: Curves, figure: Canvas, panels: list[Axes], look: Look
) -> Callable[[Any], Any]:
    """The colour of each shade, with its legend or colour bar."""
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
        size: dict[str, Any] = {"pad": 0.02, "aspect": 30 if look.narrow else 40}
        bar = figure.colorbar(
            scale,
            ax=panels,
            label="learning rate",
            location=place,
            format=words,
            ticks=ticks,
            **size,
        )
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        if handles:
            figure.legend(
                handles=handles,
                loc="outside upper center",
                ncols=2 if look.narrow else 4,
                fontsize="small",
            )
        return lambda shade: scale.to_rgba(np.asarray(float(shade)))
    values = sorted(curves.lines["shade"].dropna().unique())
    styles = (
        rank_styles(values, look) if curves.shade == labels.RANK else category_styles(values, look)
    )
    if curves.shade:
        name = curves.shade
        handles = [
            Line2D([], [], color=styles[v][0], label=labels.setting(name, v)) for v in values
        ] + handles
    if handles:
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=2 if look.narrow else 5,
            fontsize="small",
        )
    default = category_styles([0], look)[0]
    return lambda shade: styles.get(shade, default)[0]


def _status_handle(status: str, look: Look) -> Line2D:
    style, marker = status_style(status)
    ink = look.colours["soft"]
    return Line2D(
        [],
        [],
        color=ink,
        linestyle=style,
        marker=marker,
        markerfacecolor="none",
        label=status.lower(),
    )


def _reading(experiment: Experiment, curves: Curves) -> str:
    best = experiment.best_trial()
    if best is None:
        return (
            "No configuration has all its seeds complete."
            if experiment.is_sweep
            else "The run has not completed."
        )
    metric = experiment.metric
    line = curves.lines[curves.lines["run_dir"] == best["run_dir"]].sort_values("step")
    who = f"Trial {best['number']}" if experiment.is_sweep else "The run"
    if line.empty:
        return f"{who} is the best, but its steps cannot be read."
    final = float(line["score"].iloc[-1])
    if experiment.base is None or not experiment.better(final, experiment.base):
        return f"{who} ends at {labels.score(metric, final)} and does not rise above the base."
    half = experiment.base + (final - experiment.base) / 2
    reached = line[[not experiment.better(half, score) for score in line["score"]]].iloc[0]
    text = (
        f"{who} has half of its gain by step "
        f"{reached['step']}{_spent(curves, reached)}, and ends at "
    )
    text += (
        f"{labels.score(metric, final)} after "
        f"{line['step'].iloc[-1]}{_spent(curves, line.iloc[-1])}"
    )
    peak, at = float(best[f"best/{metric}"]), int(best["best/step"])
    if experiment.better(peak, final):
        text += f"; its best evaluation was {labels.score(metric, peak)} at step {at}"
    return text + "."


def _spent(curves: Curves, row: pd.Series) -> str:
    """What a run had used at an evaluation, in brackets."""
    words: dict[str, Callable[[float], str]] = {
        "tokens": lambda used: f"{EngFormatter(sep='', places=0)(used)} tokens",
        "flops": lambda used: f"{used:.1e} FLOPs".replace("e+", "e"),
        "seconds": lambda used: (
            metrics.duration(used) + (" of its pack's" if curves.packed else "")
        ),
    }
    known = [
        words[cost](float(row[cost])) for cost in curves.costs if cost in words and row[cost] > 0
    ]
    return f" ({', '.join(known)})" if known else ""


FIGURE = Figure(order=20, data=data, draw=draw, front=True, dark_apart=True)
