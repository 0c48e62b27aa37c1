"""Show the training reward of the ranks at the same rates and seeds, and its early part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from analysis.claims.claim import Obstacle
from analysis.claims.curves import CURVE_SHARE, SMOOTHING, Early, early_curves, leads
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.marks import each, handles, left_out
from analysis.figures.drawing.theme import Look, legend, rank_styles


@dataclass(frozen=True, slots=True)
class EarlyData:
    """`curves`: rank, step, reward (mean over `pairs` of rate and seed), smooth (running mean).

    `leads`: rank, lead (its reward in the first `steps` less the other ranks'), low, high (90%, as
    of two one-sided tests at 5%; NaN with one pair). Leads within `margin` count as the same.
    """

    curves: pd.DataFrame
    leads: pd.DataFrame
    steps: int
    rise: float
    margin: float
    pairs: int
    seeds: int


def data(experiment: Experiment) -> list[Plot]:
    """Return the ranks that share good rates; none where there is no early part to see."""
    e = experiment.evidence
    early = None if e is None else early_curves(e)
    if early is None or isinstance(early, Obstacle):
        return []
    chart = by_rank(early)
    what = (
        "Line chart of training reward against step, a line per rank, and a chart of early "
        "differences."
    )
    reading = _reading(chart) + left_out(experiment)
    return [Plot("early_curves", "Early training curves by rank", what, reading, chart)]


def by_rank(early: Early) -> EarlyData:
    """Return the mean curve of each rank, and its early lead over the others."""
    parts, rows = [], []
    for rank, mean in zip(early.ranks, early.curves.mean(1), strict=True):
        smooth = pd.Series(mean).rolling(SMOOTHING, center=True).mean()
        steps = np.arange(1, len(mean) + 1)
        parts.append(pd.DataFrame({"rank": rank, "step": steps, "reward": mean, "smooth": smooth}))
    pairs = early.scores.shape[1]
    for place, rank in enumerate(early.ranks):
        if pairs > 1:
            estimate = leads(early)[place]
            lead, ends = estimate.value, estimate.interval()
        else:
            others = np.delete(early.scores, place, axis=0)
            lead, ends = float(early.scores[place].mean() - others.mean()), (math.nan, math.nan)
        rows.append({"rank": rank, "lead": lead, "low": ends[0], "high": ends[1]})
    return EarlyData(
        curves=pd.concat(parts, ignore_index=True),
        leads=pd.DataFrame(rows),
        steps=early.steps,
        rise=early.rise,
        margin=CURVE_SHARE * early.rise,
        pairs=pairs,
        seeds=early.seeds,
    )


def _reading(chart: EarlyData) -> str:
    table = chart.leads
    furthest = table.iloc[int(table["lead"].abs().to_numpy().argmax())]
    last = chart.curves[chart.curves["step"] > chart.curves["step"].max() - SMOOTHING]
    ends = last.groupby("rank")["reward"].mean()
    parting = (
        f"In the last {SMOOTHING} steps they are {ends.max() - ends.min():.3f} apart, rank "
        f"{ends.idxmax()} the highest and rank {ends.idxmin()} the lowest."
    )
    lead, low, high = (
        f"{furthest[name]:+.3f}".replace("-", "−") for name in ("lead", "low", "high")
    )
    text = (
        f"In the first {chart.steps} steps, which make half of the rise, rank "
        f"{furthest['rank']:.0f} is farthest from the other ranks: {lead}"
    )
    if chart.pairs < 2:
        return f"{text}. With one seed whether that is chance is not known. {parting}"
    same = f"±{chart.margin:.3f} ({CURVE_SHARE:.0%} of the early rise)"
    inside = (table["low"] > -chart.margin) & (table["high"] < chart.margin)
    beyond = table[(table["low"] > chart.margin) | (table["high"] < -chart.margin)]
    if inside.all():
        verdict = f"Every rank's interval is within {same}: the early curves are the same"
    elif len(beyond):
        who = labels.listed([f"rank {rank}" for rank in beyond["rank"]])
        are = "is" if len(beyond) == 1 else "are"
        verdict = f"{labels.capital(who)} {are} beyond {same}: the early curves are not the same"
    else:
        verdict = (
            f"Not every rank's interval is within {same}: whether the early curves are the same is "
            "not known"
        )
    over = f"{labels.plural(chart.pairs, 'pair')} of rate and seed"
    return f"{text} (90% interval {low} to {high}, {over}). {verdict}. {parting}"


def draw(chart: EarlyData, figure: Canvas, look: Look) -> None:
    """Draw the curves with the early part shaded, and each rank's early lead with the margin."""
    if look.narrow:
        figure.set_size_inches(look.size[0], 5.6)
        left, right = figure.subplots(2, 1, height_ratios=[1.6, 1])
    else:
        left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    ranks = chart.leads["rank"].tolist()
    styles = rank_styles(ranks, look)
    good = look.colours["good"]
    for rank, line in chart.curves.groupby("rank"):
        colour = styles[rank][0]
        left.plot(line["step"], line["reward"], color=colour, linewidth=0.8, alpha=0.35, zorder=2)
        left.plot(line["step"], line["smooth"], color=colour, linewidth=1.8, zorder=3)
    left.axvspan(0, chart.steps + 0.5, color=good, zorder=0, linewidth=0)
    _name_band(left, "early", look, xytext=(3, 4))
    left.set_xlim(left=0, right=float(chart.curves["step"].max()))
    left.set_xlabel("optimizer step")
    left.set_ylabel("training reward")
    right.axvspan(-chart.margin, chart.margin, color=good, zorder=0, linewidth=0)
    right.axvline(0, color=look.colours["soft"], linewidth=1, zorder=1)
    for place, row in enumerate(each(chart.leads)):
        colour, marker = styles[row.rank]
        right.plot(row.lead, place, marker, color=colour, markersize=7, zorder=4)
        if np.isfinite(row.low):
            right.hlines(place, row.low, row.high, color=colour, linewidth=2, zorder=3)
    right.set_yticks(range(len(ranks)), [f"{rank}" for rank in ranks])
    right.margins(y=0.15)
    right.grid(axis="y", visible=False)
    _name_band(right, "the same", look, xytext=(0, 4), ha="center")
    right.set_xlabel("early reward less other ranks'")
    right.set_ylabel("rank")
    legend(figure, handles(styles, {rank: f"rank {rank}" for rank in ranks}), look)


def _name_band(axes: Axes, name: str, look: Look, **place: object) -> None:
    axes.annotate(
        name,
        (0, 1.0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=look.colours["soft"],
        **place,  # type: ignore[arg-type]
    )


FIGURE = Figure(order=50, data=data, draw=draw)
