"""Final score against learning rate, a set of marks per rank: where rates are too low and too high."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.theme import Look, base_line, category_styles
from analysis.reading import rate_words
from analysis.stats import Basin
from harness.rundir import Status


@dataclass(frozen=True, slots=True)
class Rates:
    """`points` has rank, lr, score (the last one seen where a trial did not complete), status, configuration."""

    points: pd.DataFrame
    basin: Basin | None
    base: float | None
    metric: str
    maximize: bool


def data(experiment: Experiment) -> list[Plot]:
    """Every trial with a score, when the learning rate was swept."""
    if labels.LR not in experiment.axes:
        return []
    trials, metric = experiment.trials, experiment.metric
    points = pd.DataFrame(
        {
            "rank": trials[labels.RANK] if labels.RANK in trials.columns else 0,
            "lr": trials[labels.LR],
            "score": trials[metric].fillna(trials[f"last/{metric}"]),
            "status": trials["status"],
            "configuration": trials["configuration"],
        }
    ).dropna(subset=["lr", "score"])
    if points.empty:
        return []
    adapters = sorted({int(rank) for rank in points["rank"].dropna()} - {0})
    basin = experiment.basin(*adapters)
    reading = labels.capital(rate_words(basin)) if basin else "No trial has finished yet."
    if labels.RANK in trials.columns and 0 in set(points["rank"]) and adapters:
        reading = f"LoRA, all ranks together: {reading} Full fine-tuning is judged by itself in the table."
    rates = Rates(points, basin, experiment.base, metric, experiment.direction == "maximize")
    if labels.RANK not in trials.columns:
        rates.points["rank"] = None
    what = f"{labels.metric(metric)} against learning rate on a log scale, {labels.plural(len(points), 'trial')}"
    return [Plot("lr_basin", "Score against learning rate", reading, f"Scatter chart of {what}. {reading}", rates)]


def draw(rates: Rates, figure: Canvas, look: Look) -> None:
    """A point per trial; a line per rank through its best configuration at each rate; the good rates as a band."""
    axes = figure.add_subplot()
    axes.set_xscale("log")
    ranks = sorted(rates.points["rank"].dropna().unique()) or [None]
    styles = category_styles(ranks, look)
    for rank in ranks:
        group = rates.points[rates.points["rank"] == rank] if rank is not None else rates.points
        colour, marker = styles[rank]
        _points(axes, group, colour, marker)
        done = group[group["status"] == Status.COMPLETE.value]
        means = done.groupby(["lr", "configuration"])["score"].mean().groupby("lr")
        top = (means.max() if rates.maximize else means.min()).sort_index()
        axes.plot(top.index, top.to_numpy(), color=colour, linewidth=1.6, alpha=0.75, zorder=2)
    if rates.basin:
        _bands(axes, rates.basin, "good for LoRA" if 0 in ranks and len(ranks) > 1 else "good", look)
    base_line(axes, rates.base, f"base\n{labels.score(rates.metric, rates.base)}", look)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel(labels.metric(rates.metric))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if not look.narrow else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: labels.lr(rate)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _legend(axes, figure, rates, ranks, look)


def _points(axes: Axes, group: pd.DataFrame, colour: str, marker: str) -> None:
    status = group["status"]
    done, failed = group[status == Status.COMPLETE.value], group[status == Status.FAILED.value]
    others = group[~status.isin([Status.COMPLETE.value, Status.FAILED.value])]
    axes.scatter(done["lr"], done["score"], marker=marker, s=40, color=colour, linewidths=0, zorder=3)
    axes.scatter(others["lr"], others["score"], marker=marker, s=44, facecolors="none", edgecolors=colour, zorder=3)
    axes.scatter(failed["lr"], failed["score"], marker="x", s=44, color=colour, zorder=3)


def _bands(axes: Axes, basin: Basin, good: str, look: Look) -> None:
    """Shade the good rates and name what lies on either side; band edges are halfway (in log) to the next rate."""
    low, high = axes.get_xlim()
    tested = min(low, basin.tested[0]), max(high, basin.tested[-1])
    axes.set_xlim(*tested)
    if not basin.good:
        return
    left = math.sqrt(basin.too_low[-1] * basin.good[0]) if basin.too_low else tested[0]
    right = math.sqrt(basin.good[-1] * basin.too_high[0]) if basin.too_high else tested[1]
    axes.axvspan(left, right, color=look.colours["good"], zorder=0, linewidth=0)
    spans = [("too low", tested[0], left), (good, left, right), ("too high", right, tested[1])]
    for text, start, end in spans:
        if end / start > 1.6:
            middle = math.sqrt(start * end)
            axes.annotate(
                text,
                (middle, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=look.colours["soft"],
            )


def _legend(axes: Axes, figure: Canvas, rates: Rates, ranks: list[int | None], look: Look) -> None:
    styles = category_styles(ranks, look)
    handles = [
        Line2D([], [], color=styles[r][0], marker=styles[r][1], label=labels.setting(labels.RANK, r))
        for r in ranks
        if r is not None
    ]
    ink = look.colours["soft"]
    statuses = set(rates.points["status"])
    if statuses & {Status.PRUNED.value, Status.RUNNING.value}:
        words = labels.listed([s.lower() for s in ("PRUNED", "RUNNING") if s in statuses], "or")
        hollow = Line2D(
            [], [], color=ink, marker="o", markerfacecolor="none", linestyle="", label=f"{words}: last score"
        )
        handles.append(hollow)
    if Status.FAILED.value in statuses:
        handles.append(Line2D([], [], color=ink, marker="x", linestyle="", label="failed: last score"))
    if not handles:
        return
    if look.narrow:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small")
    else:
        figure.legend(handles=handles, loc="outside right upper", fontsize="small")


FIGURE = Figure(order=10, data=data, draw=draw)
