"""Score against trained parameters, and how many of these hold what the episodes teach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from analysis.claims.evidence import Evidence, Mask
from analysis.claims.matching import BITS_PER_PARAMETER
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.cells import besides, each, left_out
from analysis.figures.drawing.marks import fit_scores, interval_marks
from analysis.figures.drawing.theme import Look, base_line, category_styles, legend, log_axis
from harness.config import metrics

FULL = "full fine-tuning"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Each arm at its own best learning rate, at the same alpha, batch size and length.

    `points`: targets, rank, parameters, score, low, high (95%, NaN with one seed), lr, seeds; full
    fine-tuning last. `needed` is the number of parameters that hold one bit of each of `episodes`.
    """

    points: pd.DataFrame
    needed: float
    episodes: int
    setting: str
    base: float | None
    metric: str


def data(experiment: Experiment) -> list[Plot]:
    """The setting with most ranks; none with fewer than two sizes of adapters."""
    e = experiment.evidence
    if e is None:
        return []
    for stratum in e.strata(e.lora, "batch", "budget", "alpha"):
        points = sizes(e, stratum)
        episodes = float(np.nanmax(e.episodes[stratum], initial=0))
        if points.loc[points["rank"] > 0, "parameters"].nunique() > 1 and episodes:
            setting = f"alpha {e.alpha[stratum][0]:g}{besides(e, stratum)}"
            needed = episodes / BITS_PER_PARAMETER
            found = Sizes(
                points, needed, int(episodes), setting, experiment.base, experiment.metric
            )
            reading = _reading(found) + left_out(experiment.tables.runs)
            what = f"{labels.metric(experiment.metric)} against trained parameters on a log scale"
            alt = (
                f"Scatter chart of {what}, {labels.plural(len(points), 'mark')} with "
                f"intervals. {reading}"
            )
            return [Plot("score_by_parameters", "Score by trained parameters", reading, alt, found)]
    return []


def sizes(e: Evidence, stratum: Mask) -> pd.DataFrame:
    """The arms of a setting whose size is known, by target modules and rank, and full fine-tuning's
    like them.
    """
    parts = [
        (e.target_names[int(code)], rank, stratum & (e.targets == code) & (e.rank == rank))
        for code in np.unique(e.targets[stratum & np.isfinite(e.targets)])
        for rank in e.ranks(stratum & (e.targets == code))
    ]
    # Student's interval knows nothing of where a share ends.
    bounds = (0.0, 1.0) if metrics.lookup(e.metric).unit == "share" else (-math.inf, math.inf)
    found = []
    for targets, rank, mask in [*parts, (FULL, 0, e.full_like(stratum))]:
        arm, parameters = e.arm(mask), float(np.nanmax(e.parameters[mask], initial=0))
        if arm is None or not parameters or not arm.eligible.any():
            continue
        level = e.level(arm)
        low, high = np.clip([level.low, level.high], *bounds)
        found.append(
            {
                "targets": targets,
                "rank": rank,
                "parameters": int(parameters),
                "score": level.value,
                "low": low,
                "high": high,
                "lr": 10 ** float(arm.log_lr[arm.top]),
                "seeds": arm.seeds,
            }
        )
    columns = ["targets", "rank", "parameters", "score", "low", "high", "lr", "seeds"]
    return pd.DataFrame(found, columns=columns)


def _reading(found: Sizes) -> str:
    adapters = found.points[found.points["rank"] > 0].sort_values("parameters")
    holds = adapters[adapters["parameters"] >= found.needed]
    room = (
        f"{found.episodes:,} episodes teach at most a bit each, which {found.needed:,.0f} "
        "parameters hold "
        f"({BITS_PER_PARAMETER} bits each): {len(holds)} of {len(adapters)} adapters have "
        "that many."
    )
    chosen = [("the smallest", adapters.iloc[0]), ("the largest", adapters.iloc[-1])]
    chosen += [("", row) for _, row in found.points[found.points["rank"] == 0].iterrows()]
    each = [f"{who + ', ' if who else ''}{_named(row, found.metric)}" for who, row in chosen]
    seeds = int(found.points["seeds"].min())
    chance = f"{seeds} seeds, 95% intervals" if seeds > 1 else "one seed, so chance is not known"
    return (
        f"{room} At {found.setting} and each at its best learning rate ({chance}): "
        f"{'; '.join(each)}."
    )


def _named(row: pd.Series, metric: str) -> str:
    who = FULL if row["rank"] == 0 else f"rank {row['rank']} on {row['targets']}"
    score = labels.score(metric, row["score"])
    if np.isfinite(row["low"]):
        score += f" ({labels.score(metric, row['low'])} to {labels.score(metric, row['high'])})"
    return f"{who} with {row['parameters']:,} parameters is at {score}"


def draw(found: Sizes, figure: Canvas, look: Look) -> None:
    """A mark and an interval per arm, its rank beside it; a line through the ranks of the same
    target modules.
    """
    axes = figure.add_subplot()
    axes.set_xscale("log")
    points = found.points
    names = list(dict.fromkeys(points["targets"]))
    styles = category_styles([name for name in names if name != FULL], look) | {
        FULL: (look.colours["ink"], "*")
    }
    for name in names:
        side = points[points["targets"] == name].sort_values("parameters")
        interval_marks(axes, side["parameters"].tolist(), side, styles[name])
        axes.plot(
            side["parameters"],
            side["score"],
            color=styles[name][0],
            linewidth=1.2,
            alpha=0.6,
            zorder=2,
        )
        for row in each(side[side["rank"] > 0]):
            name = f"r{row.rank}" if look.narrow else f"rank {row.rank}"
            axes.annotate(
                name,
                (row.parameters, row.score),
                xytext=(-5, 4),
                ha="right",
                textcoords="offset points",
                color=look.colours["soft"],
                fontsize="small",
            )
    _capacity(axes, found, look)
    base_line(axes, found.base, f"base\n{labels.score(found.metric, found.base)}", look)
    fit_scores(axes, points, found.base, found.metric)
    log_axis(axes.xaxis, look, axes.get_xlim(), EngFormatter(sep=""))
    axes.set_xlabel("trained parameters (log scale)")
    axes.set_ylabel(labels.metric(found.metric))
    handles = [Line2D([], [], color=styles[n][0], marker=styles[n][1], label=n) for n in names]
    words = "room for a bit an episode"
    handles.append(
        Line2D([], [], color=look.colours["ink"], linestyle=(0, (5, 2)), linewidth=1.2, label=words)
    )
    legend(figure, handles, look)


def _capacity(axes: Axes, found: Sizes, look: Look) -> None:
    """A line where the parameters hold a bit of each episode; what lies below it is shaded."""
    low, high = found.points["parameters"].min(), found.points["parameters"].max()
    left, right = min(low, found.needed) / 1.6, max(high, found.needed) * 1.6
    axes.axvspan(left, found.needed, color=look.colours["rule"], alpha=0.5, zorder=0, linewidth=0)
    axes.axvline(
        found.needed, color=look.colours["ink"], linestyle=(0, (5, 2)), linewidth=1.2, zorder=1
    )
    axes.set_xlim(left, right)


FIGURE = Figure(order=25, data=data, draw=draw)
