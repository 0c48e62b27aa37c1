"""Training reward of the ranks at the same rates and seeds: whether the first part is the same for
all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from analysis.claims.claim import Block
from analysis.claims.curves import CURVE_SHARE, SMOOTHING, Early, early_curves, leads
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.cells import each, left_out
from analysis.figures.drawing.theme import Look, legend, rank_styles


@dataclass(frozen=True, slots=True)
class Curves:
    """`curves`: rank, step, reward (mean over `blocks` of a rate and a seed), smooth (a running
    mean of that).

    `leads`: rank, lead (its reward in the first `steps` less the other ranks'), low, high (90%, as
    two one-sided tests at 5% have it; NaN with one block). `margin` is what differs by less is the
    same.
    """

    curves: pd.DataFrame
    leads: pd.DataFrame
    steps: int
    rise: float
    margin: float
    blocks: int
    seeds: int


def data(experiment: Experiment) -> list[Plot]:
    """The ranks that share rates at which each is good; none where there is no early part
    to see.
    """
    e = experiment.evidence
    early = None if e is None else early_curves(e)
    if early is None or isinstance(early, Block):
        return []
    curves = by_rank(early)
    reading = _reading(curves) + left_out(experiment.tables.runs)
    alt = (
        "Line chart of training reward against step, a line per rank, and a chart of "
        f"early differences. {reading}"
    )
    return [Plot("early_curves", "Early training curves by rank", reading, alt, curves)]


def by_rank(early: Early) -> Curves:
    """The mean curve of each rank, and its early lead over the others."""
    means = early.curves.mean(1)
    window = np.ones(SMOOTHING) / SMOOTHING
    edge = SMOOTHING // 2
    steps = np.arange(1, means.shape[1] + 1)
    parts = []
    for rank, mean in zip(early.ranks, means, strict=True):
        smooth = np.full(len(mean), math.nan)
        smooth[edge : len(mean) - edge] = np.convolve(mean, window, mode="valid")
        parts.append(pd.DataFrame({"rank": rank, "step": steps, "reward": mean, "smooth": smooth}))
    blocks = early.scores.shape[1]
    rows = []
    for place, rank in enumerate(early.ranks):
        others = np.delete(early.scores, place, axis=0)
        lead, ends = float(early.scores[place].mean() - others.mean()), (math.nan, math.nan)
        if blocks > 1:
            estimate = leads(early)[place]
            lead, ends = estimate.value, estimate.interval()
        rows.append({"rank": rank, "lead": lead, "low": ends[0], "high": ends[1]})
    margin = CURVE_SHARE * early.rise
    table = pd.concat(parts, ignore_index=True)
    return Curves(table, pd.DataFrame(rows), early.steps, early.rise, margin, blocks, early.seeds)


def _reading(curves: Curves) -> str:
    found = curves.leads
    furthest = found.iloc[int(found["lead"].abs().to_numpy().argmax())]
    text = (
        f"In the first {curves.steps} steps, half the rise, rank {furthest['rank']:.0f} is "
        "farthest from the other "
        f"ranks: {furthest['lead']:+.3f}".replace("-", "−")
    )
    same = f"±{curves.margin:.3f} ({CURVE_SHARE:.0%} of the early rise)"
    over = f"{labels.plural(curves.blocks, 'pair')} of rate and seed"
    if curves.blocks < 2:
        return f"{text}; with one seed whether that is chance is not known. {_parting(curves)}"
    text += f" (90% {furthest['low']:+.3f} to {furthest['high']:+.3f}, {over})".replace("-", "−")
    inside = (found["low"] > -curves.margin) & (found["high"] < curves.margin)
    beyond = found[(found["low"] > curves.margin) | (found["high"] < -curves.margin)]
    if inside.all():
        verdict = f"every rank's interval is within {same}: the same early on"
    elif len(beyond):
        who = labels.listed([f"rank {rank}" for rank in beyond["rank"]])
        verdict = f"{who} is beyond {same}: not the same"
    else:
        verdict = (
            f"not every rank's interval is within {same}: whether they are the same cannot be told"
        )
    return f"{text}; {verdict}. {_parting(curves)}"


def _parting(curves: Curves) -> str:
    last = curves.curves[curves.curves["step"] > curves.curves["step"].max() - SMOOTHING]
    ends = last.groupby("rank")["reward"].mean()
    return (
        f"In the last {SMOOTHING} steps they are {ends.max() - ends.min():.3f} apart, rank "
        f"{ends.idxmax()} the highest "
        f"and rank {ends.idxmin()} the lowest."
    )


def draw(curves: Curves, figure: Canvas, look: Look) -> None:
    """Left (or above) the curves, the early part shaded; right (or below) each rank's early lead
    and the margin.
    """
    if look.narrow:
        figure.set_size_inches(look.size[0], 5.6)
        left, right = figure.subplots(2, 1, height_ratios=[1.6, 1])
    else:
        left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    styles = rank_styles(curves.leads["rank"].tolist(), look)
    for rank, line in curves.curves.groupby("rank"):
        colour = styles[rank][0]
        left.plot(line["step"], line["reward"], color=colour, linewidth=0.8, alpha=0.35, zorder=2)
        left.plot(line["step"], line["smooth"], color=colour, linewidth=1.8, zorder=3)
    left.axvspan(0, curves.steps + 0.5, color=look.colours["good"], zorder=0, linewidth=0)
    left.annotate(
        "early",
        (0, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, 4),
        textcoords="offset points",
        color=look.colours["soft"],
    )
    left.set_xlim(left=0, right=float(curves.curves["step"].max()))
    left.set_xlabel("optimizer step")
    left.set_ylabel("training reward")
    _leads(right, curves, styles, look)
    ranks = curves.leads["rank"]
    handles = [
        Line2D([], [], color=styles[r][0], marker=styles[r][1], label=f"rank {r}") for r in ranks
    ]
    legend(figure, handles, look)


def _leads(axes: Axes, curves: Curves, styles: dict[int, tuple[str, str]], look: Look) -> None:
    axes.axvspan(-curves.margin, curves.margin, color=look.colours["good"], zorder=0, linewidth=0)
    axes.axvline(0, color=look.colours["soft"], linewidth=1, zorder=1)
    for place, row in enumerate(each(curves.leads)):
        colour, marker = styles[row.rank]
        axes.plot(row.lead, place, marker, color=colour, markersize=7, zorder=4)
        if np.isfinite(row.low):
            axes.hlines(place, row.low, row.high, color=colour, linewidth=2, zorder=3)
    axes.set_yticks(range(len(curves.leads)), [f"{rank}" for rank in curves.leads["rank"]])
    axes.margins(y=0.15)
    axes.grid(axis="y", visible=False)
    axes.annotate(
        "the same",
        (0, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        ha="center",
        textcoords="offset points",
        color=look.colours["soft"],
    )
    axes.set_xlabel("early reward less other ranks'")
    axes.set_ylabel("rank")


FIGURE = Figure(order=50, data=data, draw=draw)
