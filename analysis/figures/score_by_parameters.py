"""Show the score against trained parameters, and how many of these the episodes can fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from analysis.claims.evidence import Evidence, Mask
from analysis.claims.matching import BITS_PER_PARAMETER
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.marks import (
    arm_row,
    base_line,
    besides,
    each,
    fit_scores,
    handles,
    interval_marks,
    left_out,
    strata,
    with_interval,
)
from analysis.figures.drawing.theme import Look, category_styles, legend, log_axis
from harness.config import metrics

FULL = "full fine-tuning"


@dataclass(frozen=True, slots=True)
class SizeData:
    """Each arm at its own best learning rate, at the same alpha, batch size and length.

    `points`: targets, rank, parameters, score, low, high (95%, NaN with one seed), lr, seeds,
    rates; full fine-tuning last. `needed` parameters hold one bit of each of the `episodes`.
    """

    points: pd.DataFrame
    needed: float
    episodes: int
    setting: str
    base: float | None
    metric: str


def data(experiment: Experiment) -> list[Plot]:
    """Return the setting with most ranks; none with fewer than two sizes of adapters."""
    for e, stratum in strata(experiment, "batch", "budget", "alpha"):
        points = sizes(e, stratum)
        episodes = float(np.nanmax(e.episodes[stratum], initial=0))
        if points.loc[points["rank"] > 0, "parameters"].nunique() < 2 or not episodes:
            continue
        chart = SizeData(
            points=points,
            needed=episodes / BITS_PER_PARAMETER,
            episodes=int(episodes),
            setting=f"alpha {e.alpha[stratum][0]:g}{besides(e, stratum)}",
            base=experiment.base,
            metric=experiment.metric,
        )
        what = (
            f"Scatter chart of {labels.metric(experiment.metric)} against trained parameters on a "
            f"log scale, {labels.plural(len(points), 'mark')} with intervals."
        )
        reading = _reading(chart) + left_out(experiment)
        return [Plot("score_by_parameters", "Score by trained parameters", what, reading, chart)]
    return []


def sizes(e: Evidence, stratum: Mask) -> pd.DataFrame:
    """Return the arms of a setting whose size is known, and full fine-tuning's like them."""
    parts = [
        (e.target_names[int(code)], rank, stratum & (e.targets == code) & (e.rank == rank))
        for code in np.unique(e.targets[stratum & np.isfinite(e.targets)])
        for rank in e.ranks(stratum & (e.targets == code))
    ]
    rows = []
    for targets, rank, mask in [*parts, (FULL, 0, e.full_like(stratum))]:
        arm, parameters = e.arm(mask), int(e.size(mask))
        if arm is not None and parameters and arm.eligible.any():
            best = {"parameters": parameters, "lr": 10 ** float(arm.log_lr[arm.top])}
            rows.append({"targets": targets, "rank": rank, **best, **arm_row(e, arm)})
    names = ["targets", "rank", "parameters", "lr", "score", "low", "high", "seeds", "rates"]
    table = pd.DataFrame(rows, columns=names)
    if metrics.lookup(e.metric).unit == "share":
        # Student's interval may reach beyond the ends of a share.
        table[["low", "high"]] = table[["low", "high"]].clip(0.0, 1.0)
    return table


def _reading(chart: SizeData) -> str:
    adapters = chart.points[chart.points["rank"] > 0].sort_values("parameters")
    large = int((adapters["parameters"] >= chart.needed).sum())
    chosen = [("the smallest, ", adapters.iloc[0]), ("the largest, ", adapters.iloc[-1])]
    chosen += [("", row) for _, row in chart.points[chart.points["rank"] == 0].iterrows()]
    parts = []
    for lead, row in chosen:
        who = FULL if row["rank"] == 0 else f"rank {row['rank']} on {row['targets']}"
        score = with_interval(chart.metric, row["score"], row["low"], row["high"])
        parts.append(f"{lead}{who} with {row['parameters']:,} parameters is at {score}")
    seeds = int(chart.points["seeds"].min())
    chance = f"{seeds} seeds, 95% intervals" if seeds > 1 else "one seed, without interval"
    return (
        f"{chart.episodes:,} episodes teach at most one bit each. {chart.needed:,.0f} parameters "
        f"hold that, at {BITS_PER_PARAMETER} bits each, and {large} of {len(adapters)} adapters "
        f"have that many. At {chart.setting} and each at its best learning rate ({chance}): "
        f"{'; '.join(parts)}."
    )


def draw(chart: SizeData, figure: Canvas, look: Look) -> None:
    """Draw a mark and an interval for each arm, and a line through ranks of the same modules."""
    axes, points = figure.add_subplot(), chart.points
    axes.set_xscale("log")
    names = list(dict.fromkeys(points["targets"]))
    styles = category_styles([name for name in names if name != FULL], look)
    styles[FULL] = look.colours["ink"], "*"
    for name in names:
        side = points[points["targets"] == name].sort_values("parameters")
        interval_marks(axes, side["parameters"].tolist(), side, styles[name])
        line: dict[str, Any] = {"color": styles[name][0], "linewidth": 1.2, "alpha": 0.6}
        axes.plot(side["parameters"], side["score"], zorder=2, **line)
        for row in each(side[side["rank"] > 0]):
            axes.annotate(
                f"r{row.rank}" if look.narrow else f"rank {row.rank}",
                (row.parameters, row.score),
                xytext=(-5, 4),
                ha="right",
                textcoords="offset points",
                color=look.colours["soft"],
                fontsize="small",
            )
    # Adapters in the shaded part cannot hold a bit of each episode.
    left = min(points["parameters"].min(), chart.needed) / 1.6
    right = max(points["parameters"].max(), chart.needed) * 1.6
    axes.axvspan(left, chart.needed, color=look.colours["rule"], alpha=0.5, zorder=0, linewidth=0)
    border: dict[str, Any] = {
        "color": look.colours["ink"],
        "linestyle": (0, (5, 2)),
        "linewidth": 1.2,
    }
    axes.axvline(chart.needed, zorder=1, **border)
    axes.set_xlim(left, right)
    base_line(axes, chart.base, chart.metric, look)
    fit_scores(axes, points, chart.base, chart.metric)
    log_axis(axes.xaxis, look, axes.get_xlim(), EngFormatter(sep=""))
    axes.set_xlabel("trained parameters (log scale)")
    axes.set_ylabel(labels.metric(chart.metric))
    room = Line2D([], [], label="room for a bit an episode", **border)
    legend(figure, [*handles(styles, {name: name for name in names}), room], look)


FIGURE = Figure(order=25, data=data, draw=draw)
