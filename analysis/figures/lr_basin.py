"""Show the score against the learning rate, a line per rank, and which rates are good."""

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
from analysis.figures.drawing.marks import (
    base_line,
    configurations,
    each,
    handles,
    run_names,
)
from analysis.figures.drawing.render import Trace
from analysis.figures.drawing.theme import Look, legend, log_axis, rank_styles
from analysis.stats.rates import RateSplit, rate_span
from harness.records.run_dir import Status

# Ranks that share a rate are drawn side by side, over this share of the distance to the next rate.
DODGE = 0.3
# The height of a run without a score, as a share of the axes.
FOOT = 0.02
# With more ranks than this the reading leaves the intervals to the drawing.
MOST_INTERVALS = 5


@dataclass(frozen=True, slots=True)
class BasinData:
    """`points` has a run each: rank, lr, score (the last seen if it did not complete), status, ...

    `lines` has each rank's best configuration at each rate: rank, lr, mean, low, high, n. `tops`
    has the best of these with all seeds, and its `edge`: `lowest` or `highest` where no rate was
    tested beyond it. `split` says which rates are good.
    """

    points: pd.DataFrame
    lines: pd.DataFrame
    tops: pd.DataFrame
    split: RateSplit | None
    base: float | None
    metric: str
    source: str | None


def data(experiment: Experiment) -> list[Plot]:
    """Return every run with a score and every diverged one, when the learning rate was swept."""
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
    sources = experiment.configurations["source"].dropna().unique()
    chart = BasinData(
        points=points,
        lines=lines,
        tops=tops,
        split=experiment.rate_split(*sorted(set(points["rank"]) - {0})),
        base=experiment.base,
        metric=experiment.metric,
        source=labels.listed([str(name) for name in sources], "or") if len(sources) else None,
    )
    what = (
        f"Line and scatter chart of {labels.metric(experiment.metric)} against learning rate on a "
        f"log scale, a line per rank, {labels.plural(len(points), 'run')}."
    )
    return [Plot("lr_basin", "Score against learning rate", what, _reading(chart), chart)]


def _lines(experiment: Experiment, points: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return each rank's best configuration at each rate, and the best of these with all seeds."""
    table = configurations(experiment)
    lines = table.drop_duplicates(["rank", "lr"]).sort_values(["rank", "lr"], ignore_index=True)
    tops = table[table["whole"]].drop_duplicates("rank").sort_values("rank", ignore_index=True)
    ended = points["status"].isin([Status.COMPLETE.value, Status.PRUNED.value])
    tested = points[ended | points["diverged"]].groupby("rank")["lr"].agg(["min", "max"])
    edges = []
    for rank, lr in zip(tops["rank"], tops["lr"], strict=True):
        lowest, highest = tested.loc[rank]
        at_end = lowest != highest and lr in (lowest, highest)
        edges.append(("lowest" if lr == lowest else "highest") if at_end else None)
    names = ["rank", "lr", "mean", "low", "high", "n"]
    return lines[names], tops[names].assign(edge=pd.Series(edges, index=tops.index, dtype=object))


def _reading(chart: BasinData) -> str:
    metric, ranks = chart.metric, set(chart.points["rank"])
    words = labels.capital(chart.split.in_words()) if chart.split else "No trial has finished yet."
    parts = [f"LoRA, all ranks together: {words}" if 0 in ranks and len(ranks) > 1 else words]
    if len(chart.tops):
        few = len(chart.tops) <= MOST_INTERVALS
        bests = []
        for top in each(chart.tops):
            score = labels.score(metric, top.mean)
            if few and top.low == top.low:
                score += f", {labels.score_range(metric, top.low, top.high)}"
            bests.append(f"{labels.rank(top.rank)} {labels.lr(top.lr)} ({score})")
        interval = f", in brackets the {chart.source}" if few and chart.source else ""
        seeds = sorted(set(chart.tops["n"]))
        count = labels.plural(seeds[0], "seed")
        if len(seeds) > 1:
            count = f"{seeds[0]} to {seeds[-1]} seeds"
        parts.append(f"Best rate tested, mean over {count}{interval}: {labels.listed(bests)}.")
    wild = chart.points[chart.points["diverged"]]
    if len(wild):
        sides = {"full fine-tuning": wild[wild["rank"] == 0], "LoRA": wild[wild["rank"] > 0]}
        where = [
            f"{who} at {rate_span((side['lr'].min(), side['lr'].max()))}"
            for who, side in sides.items()
            if len(side)
        ]
        runs = labels.plural(len(chart.points), "run")
        parts.append(f"{len(wild)} of {runs} diverged: {labels.listed(where)}.")
    for edge, group in chart.tops.dropna(subset=["edge"]).groupby("edge"):
        who = labels.listed([labels.rank(rank) for rank in group["rank"]])
        parts.append(
            f"Warning: the best of {who} is the {edge} rate tested, so a better one may lie beyond."
        )
    return " ".join(parts)


def draw(chart: BasinData, figure: Canvas, look: Look) -> list[Trace]:
    """Draw a point for each run, a line for each rank, and the good rates as a band."""
    axes = figure.add_subplot()
    axes.set_xscale("log")
    ranks = sorted(set(chart.points["rank"]))
    styles = rank_styles(ranks, look)
    runs, means = [], []
    for rank, shift in zip(ranks, _shifts(chart.points, ranks), strict=True):
        colour, marker = styles[rank]
        points = chart.points[chart.points["rank"] == rank]
        _draw_points(axes, points, shift, colour, marker)
        line = chart.lines[chart.lines["rank"] == rank]
        _draw_line(axes, line, set(points["lr"]), shift, colour)
        runs += _run_traces(axes, points, shift, chart.metric)
        means.append(_mean_trace(axes, line, shift, chart.metric))
        for top in each(chart.tops[chart.tops["rank"] == rank].dropna(subset=["edge"])):
            ahead = 20 if top.edge == "highest" else -20
            arrow = {"arrowstyle": "<|-", "shrinkA": 0, "shrinkB": 6, "linewidth": 1.4}
            axes.annotate(
                "",
                (top.lr * shift, top.mean),
                arrowprops={**arrow, "color": colour},
                textcoords="offset points",
                annotation_clip=False,
                xytext=(ahead, 0),
                zorder=6,
            )
    span = float(chart.points["lr"].min()), float(chart.points["lr"].max())
    axes.set_xlim(span[0] / 1.35, span[1] * 1.35)
    if chart.split:
        good = "good for LoRA" if 0 in ranks and len(ranks) > 1 else "good"
        _draw_bands(axes, chart.split, good, look)
    base_line(axes, chart.base, chart.metric, look)
    log_axis(axes.xaxis, look, span, labels.lr)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel(labels.metric(chart.metric))
    legend(figure, _handles(chart, ranks, look), look)
    return [*runs, *means]


def _run_traces(axes: Axes, points: pd.DataFrame, shift: float, metric: str) -> list[Trace]:
    """Return a trace of one place for each run."""
    traces = []
    for point in each(points):
        lost = not math.isfinite(point.score)
        text = f"{labels.metric(metric)} {labels.score(metric, point.score)}"
        text = "no score" if lost else text
        if point.status != Status.COMPLETE.value:
            text = f"{point.status.lower()}, {text if lost else f'last {text}'}"
        text = f"diverged: {text}" if point.diverged else text
        place = _at_foot(axes) if lost else axes.transData
        at = [point.lr * shift], [FOOT if lost else point.score]
        traces.append(Trace(point.name, [text], *at, place))
    return traces


def _mean_trace(axes: Axes, line: pd.DataFrame, shift: float, metric: str) -> Trace:
    """Return the trace of a rank's line of means."""
    texts = []
    for row in each(line):
        mean, seeds = labels.score(metric, row.mean), labels.plural(row.n, "seed")
        text = f"learning rate {labels.lr(row.lr)}: mean {mean} of {seeds}"
        known = row.low == row.low
        texts.append(f"{text}, {labels.score_range(metric, row.low, row.high)}" if known else text)
    about = labels.rank(line["rank"].iloc[0]) if len(line) else ""
    return Trace(about, texts, (line["lr"] * shift).tolist(), line["mean"].tolist(), axes.transData)


def _shifts(points: pd.DataFrame, ranks: list[int]) -> list[float]:
    """Return factors on the rate that put ranks side by side; 1 where ranks share no rates."""
    rates = np.unique(points["lr"])
    shared = points.groupby("lr")["rank"].nunique()
    if len(ranks) < 2 or len(rates) < 2 or (shared > 1).sum() < 2:
        return [1.0] * len(ranks)
    step = float(np.diff(np.log10(shared[shared > 1].index.to_numpy())).min())
    return [10 ** (DODGE * step * (place / (len(ranks) - 1) - 0.5)) for place in range(len(ranks))]


def _draw_points(axes: Axes, group: pd.DataFrame, shift: float, colour: str, marker: str) -> None:
    wild, seen = group["diverged"], group["score"].notna()
    done = group["status"] == Status.COMPLETE.value
    failed = group["status"] == Status.FAILED.value
    size = 80 if marker == "*" else 36
    filled = {"marker": marker, "s": size, "color": colour, "alpha": 0.6, "linewidths": 0}
    hollow = {"marker": marker, "s": size, "facecolors": "none", "edgecolors": colour}
    cross: dict[str, Any] = {"marker": "X", "s": 64, "color": colour, "linewidths": 0}
    kinds: list[tuple[pd.Series, dict[str, Any]]] = [
        (done & ~wild, filled),
        (~done & ~failed & ~wild, hollow),
        (failed & ~wild, {"marker": "x", "s": 40, "color": colour}),
        (wild & seen, cross),
    ]
    for mask, style in kinds:
        axes.scatter(group.loc[mask, "lr"] * shift, group.loc[mask, "score"], zorder=3, **style)
    lost = group.loc[wild & ~seen, "lr"] * shift
    axes.scatter(lost, [FOOT] * len(lost), transform=_at_foot(axes), zorder=3, **cross)


def _at_foot(axes: Axes) -> Transform:
    """Return where a run stands that diverged before any evaluation: at `FOOT` of the height."""
    return blended_transform_factory(axes.transData, axes.transAxes)


def _draw_line(
    axes: Axes, line: pd.DataFrame, tested: set[float], shift: float, colour: str
) -> None:
    """Draw means and intervals; the line breaks at tested rates without a score."""
    line = line.set_index("lr").reindex(sorted(tested)).reset_index()
    rates, means = line["lr"].to_numpy() * shift, line["mean"].to_numpy()
    axes.plot(rates, means, color=colour, linewidth=1.6, zorder=2)
    known = line["low"].notna().to_numpy()
    low, high = (line[name].to_numpy()[known] for name in ("low", "high"))
    axes.vlines(rates[known], low, high, color=colour, linewidth=1.1, zorder=2)


def _draw_bands(axes: Axes, split: RateSplit, good: str, look: Look) -> None:
    """Shade the good rates and name both sides; edges are halfway (in log) to the next rate."""
    low, high = axes.get_xlim()
    first, last = min(low, split.tested[0]), max(high, split.tested[-1])
    axes.set_xlim(first, last)
    if not split.good:
        return
    left = math.sqrt(split.too_low[-1] * split.good[0]) if split.too_low else first
    right = math.sqrt(split.good[-1] * split.too_high[0]) if split.too_high else last
    axes.axvspan(left, right, color=look.colours["good"], zorder=0, linewidth=0)
    for words, start, end in (
        ("too low", first, left),
        (good, left, right),
        ("too high", right, last),
    ):
        # A label wider than its part, in shares of the axes' width, would run into the next.
        letters = math.log(end / start) / math.log(last / first) / (0.026 if look.narrow else 0.013)
        fits = [text for text in (words, words.removesuffix(" for LoRA")) if len(text) < letters]
        if fits:
            axes.annotate(
                fits[0],
                (math.sqrt(start * end), 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=look.colours["soft"],
            )


def _handles(chart: BasinData, ranks: list[int], look: Look) -> list[Line2D]:
    ink = look.colours["soft"]
    statuses = set(chart.points.loc[~chart.points["diverged"], "status"])
    marks = []
    if chart.points["diverged"].any():
        marks.append(("X", ink, "diverged"))
    unfinished = [s.lower() for s in (Status.PRUNED.value, Status.RUNNING.value) if s in statuses]
    if unfinished:
        marks.append(("o", "none", f"{labels.listed(unfinished, 'or')}: last score"))
    if Status.FAILED.value in statuses:
        marks.append(("x", ink, "failed: last score"))
    if chart.tops["edge"].notna().any():
        marks.append((">", ink, "best at the grid's edge"))
    if chart.source:
        marks.append(("|", ink, chart.source))
    return handles(rank_styles(ranks, look), {rank: labels.rank(rank) for rank in ranks}) + [
        Line2D([], [], color=ink, marker=marker, markerfacecolor=face, linestyle="", label=text)
        for marker, face, text in marks
    ]


FIGURE = Figure(order=10, data=data, draw=draw, front=True)
