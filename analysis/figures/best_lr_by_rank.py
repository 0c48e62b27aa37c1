"""Show the best learning rate against rank, its exponent, and its ratio to full fine-tuning's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.claims.arm import Arm
from analysis.claims.evidence import Evidence, Mask
from analysis.claims.rates import (
    FROM_RANK,
    LORA_OVER_FULL,
    MIN_OCTAVES,
    BestRates,
    exponent,
    unlocated,
    usual_ranks,
)
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.marks import besides, each, left_out
from analysis.figures.drawing.theme import Look, legend, log_axis, rank_styles
from analysis.stats.effects import Estimate, difference

# No dependence; alpha/sqrt(r) and a fixed multiplier by muA (2602.06204).
EXPONENTS = {"0": 0.0, "−1/4": -0.25, "−1/2": -0.5}


@dataclass(frozen=True, slots=True)
class BestRateData:
    """The best learning rate per rank (0 full fine-tuning), at the same alpha or alpha/rank.

    `points`: rank, rate, low, high (95%), located, seeds. Where the basin is not located `rate` is
    the best tested one, without an interval. `exponent` is that of rank in the rate, over `fitted`
    ranks; `ratio` is LoRA's rate over full fine-tuning's in log10; None where not known.
    `unlocated` has the ranks by the reason why their best rate is not known.
    """

    points: pd.DataFrame
    fixed: str
    exponent: Estimate | None
    fitted: tuple[int, ...]
    ratio: Estimate | None
    unlocated: dict[str, list[int]]


def data(experiment: Experiment) -> list[Plot]:
    """Return up to two plots, at the same alpha and at the same alpha/rank."""
    e, plots = experiment.evidence, []
    kinds: tuple[tuple[Literal["alpha", "scale"], str], ...] = (("alpha", ""), ("scale", "_scaled"))
    for fixed, suffix in kinds if e is not None else ():
        assert e is not None
        chart = best_rates(e, fixed)
        if chart is not None:
            what = (
                "Chart of the best learning rate of each rank, on log scales, with intervals, at "
                f"{chart.fixed}."
            )
            title = f"Best learning rate by rank, at {chart.fixed}"
            reading = _reading(chart) + left_out(experiment)
            plots.append(Plot(f"best_lr_by_rank{suffix}", title, what, reading, chart))
    return plots


def best_rates(e: Evidence, fixed: Literal["alpha", "scale"]) -> BestRateData | None:
    """Return the best rates at the setting with most ranks; None with fewer than two ranks."""
    for stratum in e.strata(e.lora, "batch", "budget", "targets", fixed):
        every = e.arms(stratum, e.ranks(stratum))
        arms = {rank: arm for rank, arm in every.items() if _has_best(arm)}
        if len(arms) > 1:
            value = float(getattr(e, fixed)[stratum][0])
            words = f"alpha {value:g}" if fixed == "alpha" else f"alpha {value:g} × rank"
            return _best_rates(e, stratum, arms, words + besides(e, stratum))
    return None


def _has_best(arm: Arm) -> bool:
    """Return whether an arm has a best rate to show: two rates at least, and a gain."""
    return len(arm.log_lr) > 1 and bool(arm.eligible.any()) and arm.gain > 0


def _best_rates(e: Evidence, stratum: Mask, arms: dict[int, Arm], fixed: str) -> BestRateData:
    full = e.arm(e.full_like(stratum))
    usual = BestRates.of({rank: arms[rank] for rank in usual_ranks(e, stratum) if rank in arms})
    whole = BestRates.of({0: full} if full is not None and _has_best(full) else {})
    best = {**whole.best, **BestRates.of(arms).best}
    rows, reasons = [], dict[str, list[int]]()
    for rank, arm in {**whole.arms, **arms}.items():
        located = best.get(rank)
        middle = float(arm.log_lr[arm.top]) if located is None else located.value
        low, high = (math.nan, math.nan) if located is None else located.interval(0.025)
        rate = {"rate": 10**middle, "low": 10**low, "high": 10**high}
        rows.append({"rank": rank, **rate, "located": located is not None, "seeds": arm.seeds})
        if obstacle := unlocated(arm, labels.rank(rank)):
            why = obstacle.why.removeprefix(f"{labels.rank(rank)} ")
            reasons.setdefault(why, []).append(rank)
    fitted = tuple(rank for rank in sorted(usual.best) if rank >= FROM_RANK)
    spans = bool(fitted) and math.log2(fitted[-1] / fitted[0]) >= MIN_OCTAVES
    ratio = None
    if usual.best and whole.best:
        ratio = difference(usual.together(list(usual.best)), whole.best[0])
    return BestRateData(
        points=pd.DataFrame(rows),
        fixed=fixed,
        exponent=exponent(usual.best)[0] if spans else None,
        fitted=fitted if spans else (),
        ratio=ratio,
        unlocated=reasons,
    )


def _reading(chart: BestRateData) -> str:
    parts = []
    if chart.exponent is not None:
        low, high = chart.exponent.interval(0.025)
        inside = [name for name, value in EXPONENTS.items() if low <= value <= high]
        sides = {"inside": inside, "outside": [name for name in EXPONENTS if name not in inside]}
        told = [f"{labels.listed(names)} {where}" for where, names in sides.items() if names]
        seeds = labels.plural(int(chart.points["seeds"].min()), "seed")
        parts.append(
            f"At {chart.fixed} the best rate goes as rank to the power "
            f"{_signed(chart.exponent.value)} (95% interval {_signed(low)} to {_signed(high)}, "
            f"ranks {chart.fitted[0]} to {chart.fitted[-1]}, {seeds}). Of theory's exponents "
            f"{', '.join(told)} the interval."
        )
    else:
        parts.append(
            f"At {chart.fixed} no exponent of rank can be fitted: ranks from {FROM_RANK} on with a "
            f"located best rate do not span a factor of {2**MIN_OCTAVES:g}."
        )
    if chart.ratio is not None:
        low, high = chart.ratio.interval(0.025)
        where = "inside" if low <= math.log10(LORA_OVER_FULL) <= high else "outside"
        parts.append(
            f"LoRA's best rate is {10**chart.ratio.value:.1f} times full fine-tuning's (95% "
            f"interval {10**low:.1f} to {10**high:.1f}; {LORA_OVER_FULL:g} is {where})."
        )
    for why, ranks in chart.unlocated.items():
        who = labels.listed([labels.rank(rank) for rank in ranks])
        parts.append(f"Not located: {who} ({'each' if len(ranks) > 1 else 'it'} {why}).")
    return " ".join(parts)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def draw(chart: BestRateData, figure: Canvas, look: Look) -> None:
    """Draw a mark and an interval for each rank, and theory's slopes through the fit's middle."""
    axes = figure.add_subplot()
    axes.set_yscale("log")
    points = chart.points.sort_values("rank", ignore_index=True)
    ranks = points["rank"].tolist()
    places = {rank: math.log2(rank) for rank in ranks if rank}
    if 0 in ranks:  # full fine-tuning stands beyond the last rank
        places[0] = max(places.values()) + 1.5
    styles = rank_styles(ranks, look)
    handles: list[Artist] = []
    if chart.exponent is not None:
        handles += _slopes(axes, chart, chart.exponent.value, look)
    full = points[(points["rank"] == 0) & points["located"]]
    if len(full):
        low, high = (LORA_OVER_FULL * float(full[name].iloc[0]) for name in ("low", "high"))
        good = look.colours["good"]
        axes.axhspan(low, high, color=good, zorder=0, linewidth=0)
        handles.append(Patch(color=good, label=f"{LORA_OVER_FULL:g} × full fine-tuning's"))
    for point in each(points):
        (colour, marker), at = styles[point.rank], places[point.rank]
        face = colour if point.located else "none"
        size = 14 if marker == "*" else 8
        axes.plot(
            at, point.rate, marker, color=colour, markersize=size, zorder=4, markerfacecolor=face
        )
        if point.located:
            axes.vlines(at, point.low, point.high, color=colour, linewidth=2, zorder=3)
    if not points["located"].all():
        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "linestyle": ""}
        soft, words = look.colours["soft"], "best tested, not located"
        handles.append(Line2D([], [], color=soft, label=words, **hollow))
    values = points[["rate", "low", "high"]].to_numpy(float)
    log_axis(axes.yaxis, look, (float(np.nanmin(values)), float(np.nanmax(values))), labels.lr)
    axes.set_xticks(list(places.values()), [f"{rank}" if rank else "full" for rank in places])
    axes.set_xlim(min(places.values()) - 0.6, max(places.values()) + 0.6)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("rank (log scale)")
    axes.set_ylabel("best learning rate (log scale)")
    legend(figure, handles, look)


def _slopes(axes: Axes, chart: BestRateData, fit: float, look: Look) -> list[Line2D]:
    """Draw the fitted exponent and theory's through the middle of the fitted ranks."""
    known = chart.points[chart.points["rank"].isin(chart.fitted)]
    x, y = np.log2(known["rank"].to_numpy(float)), np.log10(known["rate"].to_numpy())
    ends = np.array([x.min() - 0.3, x.max() + 0.3])
    dashes = [(0, (1, 2)), (0, (5, 2)), (0, (5, 2, 1, 2))]
    # The fit is wide and pale, so that a slope beneath it stays visible.
    wide: dict[str, Any] = {"color": look.colours["ink"], "alpha": 0.3, "linewidth": 5.0}
    lines = [(f"fit: rank^{_signed(fit)}", fit, {**wide, "linestyle": "-"})]
    thin: dict[str, Any] = {"color": look.colours["soft"], "alpha": 1.0, "linewidth": 1.2}
    for (name, value), dash in zip(EXPONENTS.items(), dashes, strict=True):
        lines.append((f"rank^{name}", value, {**thin, "linestyle": dash}))
    for _, value, style in lines:
        rates = 10 ** (y.mean() + value * math.log10(2) * (ends - x.mean()))
        axes.plot(ends, rates, zorder=2, **style)
    return [Line2D([], [], label=text, **style) for text, _, style in lines]


FIGURE = Figure(order=15, data=data, draw=draw)
