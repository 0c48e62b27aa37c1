"""Final score against learning rate, a line per rank: where rates are too low and too high, and
where runs diverge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.transforms import Transform, blended_transform_factory

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.cells import configurations, each
from analysis.figures.drawing.marks import run_names
from analysis.figures.drawing.theme import Look, Trace, base_line, legend, log_axis, rank_styles
from analysis.report.answer import rate_words
from analysis.stats.ranking import Basin
from harness.records.run_dir import Status

# Ranks that share a rate are drawn side by side, over this share of the distance to the next rate.
DODGE = 0.3
# How high a run without a score stands, as a share of the axes.
FOOT = 0.02
# Of more ranks than these the reading gives the scores without their intervals, which are in the
# figure.
MOST_INTERVALS = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """`points` has a run each: rank, lr, score (the last one seen where it did not complete),
    status, diverged, name.

    `lines` has each rank's best configuration at each rate: rank, lr, mean, low, high, n. `tops`
    the best of these that is whole, with `edge`: `lowest` or `highest` where no rate was tested
    beyond it.
    """

    points: pd.DataFrame
    lines: pd.DataFrame
    tops: pd.DataFrame
    basin: Basin | None
    base: float | None
    metric: str
    source: str | None


def data(experiment: Experiment) -> list[Plot]:
    """Every run with a score, and every diverged one, when the learning rate was swept."""
    if labels.LR not in experiment.axes:
        return []
    runs = experiment.tables.runs.dropna(subset=["rank", "lr"])
    diverged = runs["diverged"].fillna(False).astype(bool)
    points = pd.DataFrame(
        {
            "rank": runs["rank"].astype(int),
            "lr": runs["lr"],
            "score": runs["score"].fillna(runs["last"]),
            "status": runs["status"],
            "diverged": diverged,
            "name": runs["run_dir"].map(run_names(experiment)),
        }
    )
    points = points[points["score"].notna() | diverged].reset_index(drop=True)
    if points.empty:
        return []
    lines, tops = _lines(experiment, points)
    adapters = sorted(set(points["rank"]) - {0})
    basin = experiment.basin(*adapters) if adapters else experiment.basin()
    sources = experiment.configurations["source"].dropna().unique()
    source = labels.listed([str(name) for name in sources], "or") if len(sources) else None
    rates = Rates(points, lines, tops, basin, experiment.base, experiment.metric, source)
    reading = _reading(experiment, rates)
    what = (
        f"{labels.metric(experiment.metric)} against learning rate on a log scale, a line per rank"
    )
    alt = f"Line and scatter chart of {what}, {labels.plural(len(points), 'run')}. {reading}"
    return [Plot("lr_basin", "Score against learning rate", reading, alt, rates)]


def _lines(experiment: Experiment, points: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The best configuration of each rank at each rate, and the best of these that has all its
    seeds.
    """
    table = configurations(experiment)
    lines = table.drop_duplicates(["rank", "lr"]).sort_values(["rank", "lr"], ignore_index=True)
    tops = table[table["whole"]].drop_duplicates("rank").sort_values("rank", ignore_index=True)
    finished = (
        points["status"].isin([Status.COMPLETE.value, Status.PRUNED.value]) | points["diverged"]
    )
    tested = points[finished].groupby("rank")["lr"].agg(["min", "max"])
    edges = [
        _edge(float(lr), *tested.loc[rank])
        for rank, lr in zip(tops["rank"], tops["lr"], strict=True)
    ]
    names = ["rank", "lr", "mean", "low", "high", "n"]
    return lines[names], tops[names].assign(edge=pd.Series(edges, index=tops.index, dtype=object))


def _edge(rate: float, lowest: float, highest: float) -> str | None:
    if lowest == highest:
        return None
    return "lowest" if rate == lowest else "highest" if rate == highest else None


def _reading(experiment: Experiment, rates: Rates) -> str:
    metric, ranks = experiment.metric, set(rates.points["rank"])
    words = labels.capital(rate_words(rates.basin)) if rates.basin else "No trial has finished yet."
    parts = [f"LoRA, all ranks together: {words}" if 0 in ranks and len(ranks) > 1 else words]
    if len(rates.tops):
        told = len(rates.tops) <= MOST_INTERVALS
        bests = [
            f"{labels.setting(labels.RANK, top.rank)} {labels.lr(top.lr)} "
            f"({labels.score(metric, top.mean)}"
            + (
                f", {labels.score(metric, top.low)} to {labels.score(metric, top.high)})"
                if told and top.low == top.low
                else ")"
            )
            for top in each(rates.tops)
        ]
        interval = f", in brackets the {rates.source}" if told and rates.source else ""
        seeds = sorted(set(rates.tops["n"]))
        count = (
            labels.plural(seeds[0], "seed")
            if len(seeds) == 1
            else f"{seeds[0]} to {seeds[-1]} seeds"
        )
        parts.append(f"Best rate tested, mean over {count}{interval}: {labels.listed(bests)}.")
    wild = rates.points[rates.points["diverged"]]
    if len(wild):
        sides = [("full fine-tuning", wild[wild["rank"] == 0]), ("LoRA", wild[wild["rank"] > 0])]
        where = [f"{who} at {_span(side['lr'])}" for who, side in sides if len(side)]
        parts.append(
            f"{len(wild)} of {labels.plural(len(rates.points), 'run')} diverged: "
            f"{labels.listed(where)}."
        )
    for edge, group in rates.tops.dropna(subset=["edge"]).groupby("edge"):
        who = labels.listed([labels.setting(labels.RANK, rank) for rank in group["rank"]])
        parts.append(
            f"Warning: the best of {who} is the {edge} rate tested, so the true best may "
            "lie beyond."
        )
    return " ".join(parts)


def _span(rates: pd.Series) -> str:
    return " to ".join(dict.fromkeys([labels.lr(rates.min()), labels.lr(rates.max())]))


def draw(rates: Rates, figure: Canvas, look: Look) -> list[Trace]:
    """A point per run; a line per rank through its best configuration at each rate; the good rates
    as a band.
    """
    axes = figure.add_subplot()
    axes.set_xscale("log")
    ranks = sorted(set(rates.points["rank"]))
    styles = rank_styles(ranks, look)
    runs, means = [], []
    for rank, shift in zip(ranks, _shifts(rates.points, ranks), strict=True):
        colour, marker = styles[rank]
        points = rates.points[rates.points["rank"] == rank]
        _points(axes, points, shift, colour, marker)
        line = rates.lines[rates.lines["rank"] == rank]
        _line(axes, line, set(points["lr"]), shift, colour)
        runs += _run_traces(axes, points, shift, rates.metric)
        means.append(_mean_trace(axes, line, shift, rates))
        for top in each(rates.tops[rates.tops["rank"] == rank].dropna(subset=["edge"])):
            ahead = 1 if top.edge == "highest" else -1
            offset: dict[str, Any] = {
                "xytext": (20 * ahead, 0),
                "textcoords": "offset points",
                "annotation_clip": False,
            }
            arrow = {
                "arrowstyle": "<|-",
                "color": colour,
                "shrinkA": 0,
                "shrinkB": 6,
                "linewidth": 1.4,
            }
            axes.annotate("", (top.lr * shift, top.mean), arrowprops=arrow, zorder=6, **offset)
    span = float(rates.points["lr"].min()), float(rates.points["lr"].max())
    axes.set_xlim(span[0] / 1.35, span[1] * 1.35)
    if rates.basin:
        _bands(
            axes, rates.basin, "good for LoRA" if 0 in ranks and len(ranks) > 1 else "good", look
        )
    base_line(axes, rates.base, f"base\n{labels.score(rates.metric, rates.base)}", look)
    log_axis(axes.xaxis, look, span, labels.lr)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel(labels.metric(rates.metric))
    legend(figure, _handles(rates, ranks, look), look)
    return [*runs, *means]


def _run_traces(axes: Axes, points: pd.DataFrame, shift: float, metric: str) -> list[Trace]:
    """A trace of one place for each run."""
    traces = []
    for point in each(points):
        lost = not math.isfinite(point.score)
        text = (
            "no score" if lost else f"{labels.metric(metric)} {labels.score(metric, point.score)}"
        )
        if point.status != Status.COMPLETE.value:
            text = f"{point.status.lower()}, {'no score' if lost else f'last {text}'}"
        text = f"diverged: {text}" if point.diverged else text
        place = _foot(axes) if lost else axes.transData
        traces.append(
            Trace(point.name, [text], [point.lr * shift], [FOOT if lost else point.score], place)
        )
    return traces


def _mean_trace(axes: Axes, line: pd.DataFrame, shift: float, rates: Rates) -> Trace:
    """A rank's line of means."""
    texts = []
    for row in each(line):
        low, mean, high = (labels.score(rates.metric, end) for end in (row.low, row.mean, row.high))
        text = f"learning rate {labels.lr(row.lr)}: mean {mean} of {labels.plural(row.n, 'seed')}"
        texts.append(text if row.low != row.low else f"{text}, {low} to {high}")
    about = labels.setting(labels.RANK, line["rank"].iloc[0]) if len(line) else ""
    return Trace(about, texts, (line["lr"] * shift).tolist(), line["mean"].tolist(), axes.transData)


def _shifts(points: pd.DataFrame, ranks: list[int]) -> list[float]:
    """Factors on the rate that put ranks which share rates side by side; 1 where they
    share none.
    """
    rates = np.unique(points["lr"])
    shared = points.groupby("lr")["rank"].nunique()
    if len(ranks) < 2 or len(rates) < 2 or (shared > 1).sum() < 2:
        return [1.0] * len(ranks)
    step = float(np.diff(np.log10(shared[shared > 1].index.to_numpy())).min())
    return [10 ** (DODGE * step * (place / (len(ranks) - 1) - 0.5)) for place in range(len(ranks))]


def _points(axes: Axes, group: pd.DataFrame, shift: float, colour: str, marker: str) -> None:
    wild, done = group["diverged"], group["status"] == Status.COMPLETE.value
    failed, seen = group["status"] == Status.FAILED.value, group["score"].notna()
    size = 80 if marker == "*" else 36
    looks: list[tuple[pd.Series, dict[str, Any]]] = [
        (
            done & ~wild,
            {"marker": marker, "s": size, "color": colour, "alpha": 0.6, "linewidths": 0},
        ),
        (
            ~done & ~failed & ~wild,
            {"marker": marker, "s": size, "facecolors": "none", "edgecolors": colour},
        ),
        (failed & ~wild, {"marker": "x", "s": 40, "color": colour}),
        (wild & seen, {"marker": "X", "s": 64, "color": colour, "linewidths": 0}),
    ]
    for mask, style in looks:
        axes.scatter(group.loc[mask, "lr"] * shift, group.loc[mask, "score"], zorder=3, **style)
    lost = group.loc[wild & ~seen, "lr"] * shift
    axes.scatter(
        lost,
        [FOOT] * len(lost),
        marker="X",
        s=64,
        color=colour,
        linewidths=0,
        transform=_foot(axes),
        zorder=3,
    )


def _foot(axes: Axes) -> Transform:
    """Where a run stands that diverged before it was ever evaluated: at its rate, and at `FOOT` of
    the height.
    """
    return blended_transform_factory(axes.transData, axes.transAxes)


def _line(axes: Axes, found: pd.DataFrame, tested: set[float], shift: float, colour: str) -> None:
    """The means and their intervals; the line breaks at rates that were tested and have no
    score.
    """
    line = found.set_index("lr").reindex(sorted(tested)).reset_index()
    rates, means = line["lr"].to_numpy() * shift, line["mean"].to_numpy()
    axes.plot(rates, means, color=colour, linewidth=1.6, zorder=2)
    known = line["low"].notna().to_numpy()
    low, high = (line[name].to_numpy()[known] for name in ("low", "high"))
    axes.vlines(rates[known], low, high, color=colour, linewidth=1.1, zorder=2)


def _bands(axes: Axes, basin: Basin, good: str, look: Look) -> None:
    """Shade the good rates and name what lies on either side; band edges are halfway (in log) to
    the next rate.
    """
    low, high = axes.get_xlim()
    tested = min(low, basin.tested[0]), max(high, basin.tested[-1])
    axes.set_xlim(*tested)
    if not basin.good:
        return
    left = math.sqrt(basin.too_low[-1] * basin.good[0]) if basin.too_low else tested[0]
    right = math.sqrt(basin.good[-1] * basin.too_high[0]) if basin.too_high else tested[1]
    axes.axvspan(left, right, color=look.colours["good"], zorder=0, linewidth=0)
    room = math.log(tested[1] / tested[0])
    spans = [("too low", tested[0], left), (good, left, right), ("too high", right, tested[1])]
    for words, start, end in spans:
        # In shares of the axes' width: a label wider than its part would run into the next.
        letters = math.log(end / start) / room / (0.026 if look.narrow else 0.013)
        text = next(
            (text for text in (words, words.removesuffix(" for LoRA")) if len(text) < letters), None
        )
        if text:
            place: dict[str, Any] = {
                "xycoords": ("data", "axes fraction"),
                "xytext": (0, 4),
                "textcoords": "offset points",
            }
            axes.annotate(
                text,
                (math.sqrt(start * end), 1.0),
                ha="center",
                color=look.colours["soft"],
                **place,
            )


def _handles(rates: Rates, ranks: list[int], look: Look) -> list[Line2D]:
    styles, ink = rank_styles(ranks, look), look.colours["soft"]
    handles = [
        Line2D(
            [], [], color=styles[r][0], marker=styles[r][1], label=labels.setting(labels.RANK, r)
        )
        for r in ranks
    ]
    points = rates.points[~rates.points["diverged"]]
    statuses = set(points["status"])
    marks = []
    if rates.points["diverged"].any():
        marks.append(("X", ink, "diverged"))
    unfinished = [s.lower() for s in (Status.PRUNED.value, Status.RUNNING.value) if s in statuses]
    if unfinished:
        marks.append(("o", "none", f"{labels.listed(unfinished, 'or')}: last score"))
    if Status.FAILED.value in statuses:
        marks.append(("x", ink, "failed: last score"))
    if rates.tops["edge"].notna().any():
        marks.append((">", ink, "best at the grid's edge"))
    if rates.source:
        marks.append(("|", ink, rates.source))
    for marker, face, text in marks:
        handles.append(
            Line2D([], [], color=ink, marker=marker, markerfacecolor=face, linestyle="", label=text)
        )
    return handles


FIGURE = Figure(order=10, data=data, draw=draw, front=True)
