"""The best learning rate against rank, its exponent against theory's, and its ratio to full
fine-tuning's.
"""

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
    Rates,
    exponent,
    unlocated,
    usual_ranks,
)
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.cells import besides, each, left_out
from analysis.figures.drawing.theme import Look, legend, log_axis, rank_styles
from analysis.stats.effects import Estimate, difference

# No dependence; alpha/sqrt(r) and a fixed multiplier by muA (2602.06204).
EXPONENTS = {"0": 0.0, "−1/4": -0.25, "−1/2": -0.5}


@dataclass(frozen=True, slots=True)
class Best:
    """Where the best learning rate lies, per rank (0 full fine-tuning), with `fixed` (alpha or
    alpha/rank) the same.

    `points`: rank, rate, low, high (95%), located, seeds; where the basin is not located `rate` is
    the best of the tested ones, without an interval. `exponent` is rank's in the rate, over
    `fitted` ranks; `ratio` LoRA's rate over full fine-tuning's in log10. None where they cannot be
    told. `unlocated` has the ranks by the reason why their best rate is not known.
    """

    points: pd.DataFrame
    fixed: str
    exponent: Estimate | None
    fitted: tuple[int, ...]
    ratio: Estimate | None
    unlocated: dict[str, list[int]]


def data(experiment: Experiment) -> list[Plot]:
    """Up to two plots, with the same alpha and with the same alpha/rank, for the ranks that share
    it.
    """
    e = experiment.evidence
    found = [] if e is None else [(fixed, best_rates(e, fixed)) for fixed in ("alpha", "scale")]
    note = left_out(experiment.tables.runs)
    return [
        _plot(best, "" if fixed == "alpha" else "_scaled", note)
        for fixed, best in found
        if best is not None
    ]


def best_rates(e: Evidence, fixed: Literal["alpha", "scale"]) -> Best | None:
    """The best rates at the setting with most ranks; None where fewer than two ranks have been over
    two rates.
    """
    for stratum in e.strata(e.lora, "batch", "budget", "targets", fixed):
        arms = {
            rank: arm for rank, arm in e.arms(stratum, e.ranks(stratum)).items() if _chosen(arm)
        }
        if len(arms) > 1:
            value = float(getattr(e, fixed)[stratum][0])
            words = f"alpha {value:g}" if fixed == "alpha" else f"alpha {value:g} × rank"
            return _found(e, stratum, arms, words + besides(e, stratum))
    return None


def _chosen(arm: Arm) -> bool:
    """Whether an arm has a best rate to show: two rates at least, and a gain."""
    return len(arm.log_lr) > 1 and bool(arm.eligible.any()) and arm.gain > 0


def _found(e: Evidence, stratum: Mask, arms: dict[int, Arm], fixed: str) -> Best:
    full = e.arm(e.full_like(stratum))
    usual = Rates.of({rank: arms[rank] for rank in usual_ranks(e, stratum) if rank in arms})
    whole = Rates.of({0: full} if full is not None and _chosen(full) else {})
    lora = Rates.of(arms)
    shown = {**whole.arms, **arms}
    located = {**whole.best, **lora.best}
    points = pd.DataFrame([_point(rank, arm, located.get(rank)) for rank, arm in shown.items()])
    fitted = tuple(rank for rank in sorted(usual.best) if rank >= FROM_RANK)
    spans = bool(fitted) and math.log2(fitted[-1] / fitted[0]) >= MIN_OCTAVES
    ratio = (
        difference(usual.together(list(usual.best)), whole.best[0])
        if usual.best and whole.best
        else None
    )
    return Best(
        points=points,
        fixed=fixed,
        exponent=exponent(usual.best)[0] if spans else None,
        fitted=fitted if spans else (),
        ratio=ratio,
        unlocated=_unlocated(shown),
    )


def _unlocated(arms: dict[int, Arm]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, arm in arms.items():
        who = labels.setting(labels.RANK, rank)
        block = unlocated(arm, who)
        if block is not None:
            found.setdefault(block.why.removeprefix(f"{who} "), []).append(rank)
    return found


def _point(rank: int, arm: Arm, best: Estimate | None) -> dict[str, float | int | bool]:
    middle = float(arm.log_lr[arm.top]) if best is None else best.value
    low, high = (math.nan, math.nan) if best is None else best.interval(0.025)
    return {
        "rank": rank,
        "rate": 10**middle,
        "low": 10**low,
        "high": 10**high,
        "located": best is not None,
        "seeds": arm.seeds,
    }


def _plot(best: Best, suffix: str, note: str) -> Plot:
    reading = _reading(best) + note
    alt = (
        "Chart of the best learning rate of each rank, on log scales, with intervals, "
        f"at {best.fixed}. {reading}"
    )
    return Plot(
        f"best_lr_by_rank{suffix}",
        f"Best learning rate by rank, at {best.fixed}",
        reading,
        alt,
        best,
    )


def _reading(best: Best) -> str:
    parts = []
    seeds = labels.plural(int(best.points["seeds"].min()), "seed")
    if best.exponent is not None:
        low, high = best.exponent.interval(0.025)
        inside = [name for name, value in EXPONENTS.items() if low <= value <= high]
        sides = (inside, "within"), ([name for name in EXPONENTS if name not in inside], "outside")
        told = ", ".join(f"{labels.listed(names)} {where}" for names, where in sides if names)
        parts.append(
            f"At {best.fixed} the best rate goes as rank to the power "
            f"{_signed(best.exponent.value)} (95% "
            f"{_signed(low)} to {_signed(high)}, ranks {best.fitted[0]} to "
            f"{best.fitted[-1]}, {seeds}): {told} that."
        )
    else:
        why = (
            f"ranks from {FROM_RANK} on with a located best rate do not span a factor of "
            f"{2**MIN_OCTAVES:g}"
        )
        parts.append(f"At {best.fixed} no exponent of rank can be fitted: {why}.")
    if best.ratio is not None:
        low, high = best.ratio.interval(0.025)
        where = "within" if low <= math.log10(LORA_OVER_FULL) <= high else "outside"
        parts.append(
            f"LoRA's best rate is {10**best.ratio.value:.1f} times full fine-tuning's (95% "
            f"{10**low:.1f} to "
            f"{10**high:.1f}; {LORA_OVER_FULL:g} is {where})."
        )
    for why, ranks in best.unlocated.items():
        who = labels.listed([labels.setting(labels.RANK, rank) for rank in ranks])
        parts.append(f"Not located: {who} ({'each' if len(ranks) > 1 else 'it'} {why}).")
    return " ".join(parts)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def draw(best: Best, figure: Canvas, look: Look) -> None:
    """A mark and an interval per rank, full fine-tuning apart; theory's slopes through the fit's
    middle.
    """
    axes = figure.add_subplot()
    axes.set_yscale("log")
    points = best.points.sort_values("rank", ignore_index=True)
    places = _places(points["rank"].tolist())
    styles = rank_styles(points["rank"].tolist(), look)
    handles: list[Artist] = []
    if best.exponent is not None:
        handles += _slopes(axes, best, look)
    handles += _full(axes, points, look)
    for point in each(points):
        colour, marker = styles[point.rank]
        face = colour if point.located else "none"
        size = 14 if marker == "*" else 8
        axes.plot(
            places[point.rank],
            point.rate,
            marker,
            color=colour,
            markerfacecolor=face,
            markersize=size,
            zorder=4,
        )
        if point.located:
            axes.vlines(
                places[point.rank], point.low, point.high, color=colour, linewidth=2, zorder=3
            )
    if not points["located"].all():
        ink = look.colours["soft"]
        words = "best tested, not located"
        handles.append(
            Line2D([], [], color=ink, marker="o", markerfacecolor="none", linestyle="", label=words)
        )
    values = points[["rate", "low", "high"]].to_numpy(float)
    log_axis(axes.yaxis, look, (float(np.nanmin(values)), float(np.nanmax(values))), labels.lr)
    names = {0: "full"} | {rank: f"{rank}" for rank in places if rank}
    axes.set_xticks(list(places.values()), [names[rank] for rank in places])
    axes.set_xlim(min(places.values()) - 0.6, max(places.values()) + 0.6)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("rank (log scale)")
    axes.set_ylabel("best learning rate (log scale)")
    legend(figure, handles, look)


def _places(ranks: list[int]) -> dict[int, float]:
    """Where each rank stands: its log2; full fine-tuning beyond the last."""
    places = {rank: math.log2(rank) for rank in ranks if rank}
    return {**places, **({0: max(places.values()) + 1.5} if 0 in ranks else {})}


def _slopes(axes: Axes, best: Best, look: Look) -> list[Line2D]:
    """The fitted exponent, and theory's for comparison, through the middle of the fitted ranks."""
    assert best.exponent is not None
    known = best.points[best.points["rank"].isin(best.fitted)]
    x, y = np.log2(known["rank"].to_numpy(float)), np.log10(known["rate"].to_numpy())
    ends = np.array([x.min() - 0.3, x.max() + 0.3])
    ink, soft = look.colours["ink"], look.colours["soft"]
    dashes = dict(zip(EXPONENTS, [(0, (1, 2)), (0, (5, 2)), (0, (5, 2, 1, 2))], strict=True))
    lines: list[tuple[str, float, str, Any, float]] = [("fit", best.exponent.value, ink, "-", 5.0)]
    lines += [(name, value, soft, dashes[name], 1.2) for name, value in EXPONENTS.items()]
    handles = []
    for name, value, colour, style, width in lines:
        rates = 10 ** (y.mean() + value * math.log10(2) * (ends - x.mean()))
        # The fit is wide and pale, so that a slope of theory's that it falls on stays visible.
        alpha = 0.3 if name == "fit" else 1.0
        axes.plot(
            ends, rates, color=colour, alpha=alpha, linestyle=style, linewidth=width, zorder=2
        )
        text = f"fit: rank^{_signed(value)}" if name == "fit" else f"rank^{name}"
        handles.append(
            Line2D([], [], color=colour, alpha=alpha, linestyle=style, linewidth=width, label=text)
        )
    return handles


def _full(axes: Axes, points: pd.DataFrame, look: Look) -> list[Patch]:
    """Ten times full fine-tuning's best rate as a band as wide as that rate's interval."""
    full = points[(points["rank"] == 0) & points["located"]]
    if full.empty:
        return []
    low, high = (LORA_OVER_FULL * float(full[name].iloc[0]) for name in ("low", "high"))
    axes.axhspan(low, high, color=look.colours["good"], zorder=0, linewidth=0)
    return [Patch(color=look.colours["good"], label=f"{LORA_OVER_FULL:g} × full fine-tuning's")]


FIGURE = Figure(order=15, data=data, draw=draw)
