"""Show what larger batches cost LoRA and full fine-tuning, at the best learning rate of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullLocator

from analysis.claims.arm import Arm
from analysis.claims.claim import gap
from analysis.claims.evidence import Evidence
from analysis.claims.matching import by_batch
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.marks import (
    arm_row,
    base_line,
    fit_scores,
    handles,
    interval_marks,
    left_out,
    strata,
    tuned,
    with_interval,
)
from analysis.figures.drawing.theme import Look, legend, rank_styles


@dataclass(frozen=True, slots=True)
class BatchData:
    """Scores by batch size, and what larger batches cost.

    `points`: rank (0 full fine-tuning), batch (sequences an update), score, low, high, seeds,
    rates.

    `costs`: rank, cost (from the smallest batch to the largest, positive where it hurts), low,
    high. Intervals are 95%, NaN with one seed.
    """

    points: pd.DataFrame
    costs: pd.DataFrame
    base: float | None
    metric: str


def data(experiment: Experiment) -> list[Plot]:
    """Return the first setting that ran at two batch sizes; none where the batch did not vary."""
    for e, stratum in strata(experiment, "targets", "alpha"):
        sizes = {}
        for size, arms in by_batch(e, stratum).items():
            # An arm has no score when every learning rate has a diverged run.
            scored = {rank: arm for rank, arm in arms.items() if arm.eligible.any()}
            if scored:
                sizes[size] = scored
        if len(sizes) > 1:
            return [_plot(experiment, e, sizes)]
    return []


def _plot(experiment: Experiment, e: Evidence, sizes: dict[float, dict[int, Arm]]) -> Plot:
    rows = [
        {"rank": rank, "batch": size, **arm_row(e, arm)}
        for size, arms in sizes.items()
        for rank, arm in arms.items()
    ]
    points = pd.DataFrame(rows).sort_values(["rank", "batch"], ignore_index=True)
    small, large = sizes[min(sizes)], sizes[max(sizes)]
    shared = sorted(set(small) & set(large))
    costs = pd.DataFrame(
        [_cost(e, rank, small[rank], large[rank]) for rank in shared],
        columns=["rank", "cost", "low", "high"],
    )
    chart = BatchData(points, costs, experiment.base, experiment.metric)
    what = (
        f"Line chart of {labels.metric(experiment.metric)} against batch size at {len(sizes)} "
        "sizes, a line per rank."
    )
    reading = _reading(experiment, chart, (min(sizes), max(sizes))) + left_out(experiment)
    title = "Batch size: what it costs LoRA and full fine-tuning"
    return Plot("batch_size", title, what, reading, chart)


def _cost(e: Evidence, rank: int, small: Arm, large: Arm) -> dict[str, float]:
    cost = gap(small, large)
    if cost is None:
        value = e.sign * (e.best_score(small).value - e.best_score(large).value)
        return {"rank": rank, "cost": value, "low": math.nan, "high": math.nan}
    low, high = cost.interval(0.025)
    return {"rank": rank, "cost": cost.value, "low": low, "high": high}


def _reading(experiment: Experiment, chart: BatchData, ends: tuple[float, float]) -> str:
    if chart.costs.empty:
        return "No rank has scores at both the smallest and the largest batch."
    each = [
        f"{labels.rank(row['rank'])} "
        f"{with_interval(chart.metric, row['cost'], row['low'], row['high'])}"
        for _, row in chart.costs.iterrows()
    ]
    budgets = sorted(set(experiment.tables.runs["budget"].dropna()))
    length = f"Lengths differ ({labels.listed(budgets)})"
    if len(budgets) == 1:
        length = f"All ran {budgets[0]}"
    return (
        f"Going from {ends[0]:g} to {ends[1]:g} sequences an update costs {labels.listed(each)} "
        f"({tuned(chart.points)}). {length}."
    )


def draw(chart: BatchData, figure: Canvas, look: Look) -> None:
    """Draw a line for each rank over batch sizes (log scale), with a mark and interval at each."""
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    ranks = sorted(chart.points["rank"].unique())
    styles = rank_styles(ranks, look)
    sizes = sorted(chart.points["batch"].unique())
    # Intervals at one batch size would hide each other, so they stand side by side.
    shift = (sizes[-1] / sizes[0]) ** (0.035 if look.narrow else 0.015)
    for place, rank in enumerate(ranks):
        rows = chart.points[chart.points["rank"] == rank].sort_values("batch")
        at = rows["batch"].to_numpy(float) * shift ** (place - (len(ranks) - 1) / 2)
        axes.plot(at, rows["score"], color=styles[rank][0], linewidth=1.4, alpha=0.75, zorder=2)
        interval_marks(axes, at, rows, styles[rank])
    fit_scores(axes, chart.points, chart.base, chart.metric)
    base_line(axes, chart.base, chart.metric, look)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    beyond = (sizes[-1] / sizes[0]) ** 0.14
    axes.set_xlim(sizes[0] / beyond, sizes[-1] * beyond)
    axes.set_xlabel("sequences an update (log scale)")
    axes.set_ylabel(labels.metric(chart.metric))
    legend(figure, handles(styles, {rank: labels.rank(rank) for rank in ranks}), look)


FIGURE = Figure(order=45, data=data, draw=draw)
