"""What larger batches cost LoRA and full fine-tuning: score at the best learning rate against batch
size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from analysis.claims.arm import Arm
from analysis.claims.claim import gap
from analysis.claims.evidence import Evidence
from analysis.claims.matching import by_batch
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.marks import agreeing, fit_scores, interval_marks, tuned
from analysis.figures.drawing.theme import Look, base_line, legend, rank_styles


@dataclass(frozen=True, slots=True)
class Batches:
    """`points`: rank (0 full fine-tuning), batch (sequences an update), score with low and high
    (95%), seeds, rates.

    `costs`: rank, cost (from the smallest batch to the largest, positive where it hurts) with low
    and high; intervals are NaN with one seed.
    """

    points: pd.DataFrame
    costs: pd.DataFrame
    base: float | None
    metric: str


def data(experiment: Experiment) -> list[Plot]:
    """The first stratum (target modules, alpha) that ran at two batch sizes; none where the batch
    was not varied.
    """
    e = experiment.evidence
    if e is None:
        return []
    for stratum in e.strata(e.lora, "targets", "alpha"):
        found = by_batch(e, stratum).items()
        # An arm whose every learning rate has a diverged run has no score.
        scored = {
            size: {rank: arm for rank, arm in arms.items() if arm.eligible.any()}
            for size, arms in found
        }
        sizes = {size: arms for size, arms in scored.items() if arms}
        if len(sizes) > 1:
            return [_plot(experiment, e, sizes)]
    return []


def draw(batches: Batches, figure: Canvas, look: Look) -> None:
    """A line per rank and for full fine-tuning over batch sizes (log scale), a mark with its
    interval at each.
    """
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    ranks = sorted(batches.points["rank"].unique())
    styles = rank_styles(ranks, look)
    sizes = sorted(batches.points["batch"].unique())
    shift = (sizes[-1] / sizes[0]) ** (0.035 if look.narrow else 0.015)
    for place, rank in enumerate(ranks):
        rows = batches.points[batches.points["rank"] == rank].sort_values("batch")
        # Side by side, for intervals at one batch size would hide each other.
        at = rows["batch"].to_numpy(float) * shift ** (place - (len(ranks) - 1) / 2)
        axes.plot(at, rows["score"], color=styles[rank][0], linewidth=1.4, alpha=0.75, zorder=2)
        interval_marks(axes, at, rows, styles[rank])
    fit_scores(axes, batches.points, batches.base, batches.metric)
    base_line(axes, batches.base, f"base\n{labels.score(batches.metric, batches.base)}", look)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    beyond = (sizes[-1] / sizes[0]) ** 0.14
    axes.set_xlim(sizes[0] / beyond, sizes[-1] * beyond)
    axes.set_xlabel("sequences an update (log scale)")
    axes.set_ylabel(labels.metric(batches.metric))
    handles = [
        Line2D(
            [], [], color=styles[r][0], marker=styles[r][1], label=labels.setting(labels.RANK, r)
        )
        for r in ranks
    ]
    legend(figure, handles, look)


def _plot(experiment: Experiment, e: Evidence, sizes: dict[float, dict[int, Arm]]) -> Plot:
    rows = []
    for size, arms in sizes.items():
        for rank, arm in arms.items():
            level = e.level(arm)
            rows.append(
                {
                    "rank": rank,
                    "batch": size,
                    "score": level.value,
                    "low": level.low,
                    "high": level.high,
                    "seeds": arm.seeds,
                    "rates": int(arm.eligible.sum()),
                }
            )
    points = pd.DataFrame(rows).sort_values(["rank", "batch"], ignore_index=True)
    small, large = min(sizes), max(sizes)
    shared = sorted(set(sizes[small]) & set(sizes[large]))
    costs = pd.DataFrame(
        [_cost(e, rank, sizes[small][rank], sizes[large][rank]) for rank in shared],
        columns=["rank", "cost", "low", "high"],
    )
    batches = Batches(points, costs, experiment.base, experiment.metric)
    runs = experiment.tables.runs
    reading = _reading(batches, (small, large), sorted(set(runs["budget"].dropna()))) + agreeing(
        e, runs
    )
    alt = (
        f"Line chart of {labels.metric(experiment.metric)} against batch size at "
        f"{len(sizes)} sizes, a line per rank."
    )
    return Plot(
        "batch_size",
        "Batch size: what LoRA and full fine-tuning bear",
        reading,
        f"{alt} {reading}",
        batches,
    )


def _cost(e: Evidence, rank: int, small: Arm, large: Arm) -> dict[str, float]:
    cost = gap(small, large)
    if cost is None:
        value = e.sign * (e.level(small).value - e.level(large).value)
        return {"rank": rank, "cost": value, "low": math.nan, "high": math.nan}
    low, high = cost.interval(0.025)
    return {"rank": rank, "cost": cost.value, "low": low, "high": high}


def _reading(batches: Batches, ends: tuple[float, float], budgets: list[str]) -> str:
    if batches.costs.empty:
        return "No rank has scores at both the smallest and the largest batch."
    each = [_in_words(row, batches.metric) for _, row in batches.costs.iterrows()]
    length = (
        f"All ran {budgets[0]}"
        if len(budgets) == 1
        else f"Lengths differ ({labels.listed(budgets)})"
    )
    return (
        f"Going from {ends[0]:g} to {ends[1]:g} sequences an update costs {labels.listed(each)} "
        f"({tuned(batches.points)}). {length}."
    )


def _in_words(row: pd.Series, metric: str) -> str:
    rank = int(row["rank"])
    who = "full fine-tuning" if rank == 0 else f"rank {rank}"
    text = f"{who} {labels.score(metric, row['cost'])}"
    if not np.isfinite(row["low"]):
        return text
    return f"{text} ({labels.score(metric, row['low'])} to {labels.score(metric, row['high'])})"


FIGURE = Figure(order=45, data=data, draw=draw)
