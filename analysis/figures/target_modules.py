"""Target modules compared where the rest is equal: at the same rank, and at about as many trained
parameters.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from analysis.claims.claim import gap
from analysis.claims.evidence import Evidence, Mask
from analysis.claims.matching import Pair, equal_parameters, equal_rank
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.marks import agreeing, fit_scores, interval_marks, tuned
from analysis.figures.drawing.theme import Look, base_line, category_styles, legend
from analysis.stats.effects import Estimate, average

EQUAL_RANK, EQUAL_PARAMETERS = "equal rank", "equal parameters"
_MATCH = {EQUAL_RANK: equal_rank, EQUAL_PARAMETERS: equal_parameters}
# More groups than this have no room for their names on a narrow page.
MAX_GROUPS = 6

Matched = dict[tuple[float, float], list[Pair]]


@dataclass(frozen=True, slots=True)
class Placements:
    """Arms that can be compared, each at its own best learning rate; `setting` is what they share.

    `points`: panel, group (its name), targets, rank, parameters, score with low and high (95%, NaN
    with one seed), seeds, rates. `gaps`: panel, first, second, pairs, gap (first less second, in
    the metric) with low and high.
    """

    points: pd.DataFrame
    gaps: pd.DataFrame
    setting: str
    base: float | None
    metric: str
    maximize: bool


def data(experiment: Experiment) -> list[Plot]:
    """The pairs of the first stratum (batch size, length, alpha) that has any; none without two
    sets of modules.
    """
    e = experiment.evidence
    if e is None:
        return []
    for stratum in e.strata(e.lora, "batch", "budget", "alpha"):
        found = {panel: _matched(e, stratum, panel) for panel in _MATCH}
        if any(found.values()):
            return [_plot(experiment, e, stratum, found)]
    return []


def draw(placements: Placements, figure: Canvas, look: Look) -> None:
    """A panel per kind of pair; within a group, a mark with its interval per set of target
    modules.
    """
    panels = _panels(placements)
    names = list(dict.fromkeys(placements.points["targets"]))
    styles = category_styles(sorted(names), look)
    if look.narrow:
        figure.set_size_inches(look.size[0], 2.9 * len(panels) + 0.8)
    shape = (len(panels), 1) if look.narrow else (1, len(panels))
    for axes, panel in zip(np.atleast_1d(figure.subplots(*shape)).flat, panels, strict=True):
        _panel(axes, placements, panel, styles)
        axes.tick_params(axis="x", labelsize="x-small" if look.narrow else "small")
        outer = look.narrow or panel == panels[-1]
        name = f"base\n{labels.score(placements.metric, placements.base)}" if outer else ""
        base_line(axes, placements.base, name, look)
    handles = [
        Line2D([], [], color=c, marker=m, linestyle="", label=name)
        for name, (c, m) in styles.items()
    ]
    legend(figure, handles, look)


def _panel(
    axes: Axes, placements: Placements, panel: str, styles: dict[Any, tuple[str, str]]
) -> None:
    points = placements.points[placements.points["panel"] == panel]
    groups = list(dict.fromkeys(points["group"]))
    for place, group in enumerate(groups):
        rows = points[points["group"] == group].sort_values("targets")
        for shift, (_, row) in zip(_spread(len(rows)), rows.iterrows(), strict=True):
            interval_marks(axes, [place + shift], row.to_frame().T, styles[row["targets"]])
    fit_scores(axes, placements.points, placements.base, placements.metric)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("rank" if panel == EQUAL_RANK else "trained parameters")
    axes.set_ylabel(labels.metric(placements.metric))
    axes.set_title(f"at {panel}", fontsize="medium")


def _spread(count: int) -> list[float]:
    return [min(0.24, 0.7 / count) * (place - (count - 1) / 2) for place in range(count)]


def _matched(e: Evidence, stratum: Mask, panel: str) -> Matched:
    codes = np.unique(e.targets[stratum & np.isfinite(e.targets)]).tolist()
    every = {
        (one, two): _MATCH[panel](e, stratum, one, two)
        for one, two in itertools.combinations(codes, 2)
    }
    # An arm whose every learning rate has a diverged run has no score.
    scored = {
        codes: [
            pair
            for pair in pairs
            if pair.first.arm.eligible.any() and pair.second.arm.eligible.any()
        ]
        for codes, pairs in every.items()
    }
    return {codes: pairs for codes, pairs in scored.items() if pairs}


def _plot(experiment: Experiment, e: Evidence, stratum: Mask, found: dict[str, Matched]) -> Plot:
    points = pd.concat(
        [_points(e, panel, matched) for panel, matched in found.items()], ignore_index=True
    )
    gaps = [_gap(e, panel, *item) for panel, matched in found.items() for item in matched.items()]
    setting = f"alpha {e.alpha[stratum][0]:g}"
    if len(np.unique(e.batch[e.lora])) > 1:
        setting += f", {e.batch[stratum][0]:g} sequences a batch"
    placements = Placements(
        points, pd.DataFrame(gaps), setting, experiment.base, experiment.metric, e.sign > 0
    )
    reading = _reading(placements) + agreeing(e, experiment.tables.runs)
    where = labels.listed([f"at {panel}" for panel in _panels(placements)])
    alt = f"Dot chart of {labels.metric(experiment.metric)} by target modules {where}."
    return Plot(
        "target_modules", "Target modules, all else equal", reading, f"{alt} {reading}", placements
    )


def _points(e: Evidence, panel: str, matched: Matched) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for codes, pairs in matched.items():
        for pair in pairs:
            at, group = _group(panel, pair)
            for code, placed in zip(codes, (pair.first, pair.second), strict=True):
                level = e.level(placed.arm)
                rows.append(
                    {
                        "panel": panel,
                        "at": at,
                        "group": group,
                        "targets": e.target_names[int(code)],
                        "rank": placed.rank,
                        "parameters": placed.parameters,
                        "score": level.value,
                        "low": level.low,
                        "high": level.high,
                        "seeds": placed.arm.seeds,
                        "rates": int(placed.arm.eligible.sum()),
                    }
                )
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows).drop_duplicates(["panel", "group", "targets"])
    kept = sorted(set(zip(table["at"], table["group"], strict=True)))[:MAX_GROUPS]
    table = table[table["group"].isin([group for _, group in kept])]
    return table.sort_values(["at", "group", "targets"], ignore_index=True).drop(columns="at")


def _group(panel: str, pair: Pair) -> tuple[float, str]:
    """Where a pair stands on its panel's axis, and its name there."""
    one, two = pair.first, pair.second
    if panel == EQUAL_RANK:
        return float(one.rank), f"{one.rank}"
    size = math.sqrt(one.parameters * two.parameters)
    ranks = labels.listed([f"{rank}" for rank in sorted({one.rank, two.rank})])
    return size, f"{_count(size)}\nrank {ranks}"


def _gap(e: Evidence, panel: str, codes: tuple[float, float], pairs: list[Pair]) -> dict[str, Any]:
    """The mean gap over pairs, in the metric's own direction; without an interval where an arm has
    one seed.
    """
    found = [gap(pair.first.arm, pair.second.arm) for pair in pairs]
    known = [one for one in found if one is not None]
    if len(known) == len(pairs):
        mean = average(known).scaled(e.sign)
    else:
        levels = [(e.level(pair.first.arm).value, e.level(pair.second.arm).value) for pair in pairs]
        mean = Estimate(float(np.mean([one - two for one, two in levels])), math.nan, math.nan)
    first, second = (e.target_names[int(code)] for code in codes)
    low, high = mean.interval(0.025)
    return {
        "panel": panel,
        "first": first,
        "second": second,
        "pairs": len(pairs),
        "gap": mean.value,
        "low": low,
        "high": high,
    }


def _panels(placements: Placements) -> list[str]:
    return list(dict.fromkeys(placements.points["panel"]))


def _reading(placements: Placements) -> str:
    parts = []
    for panel, gaps in placements.gaps.groupby("panel", sort=False):
        first = _ahead(gaps, placements.maximize)
        parts.append(
            f"At {panel} {first} is {labels.listed(_against(gaps, first, placements.metric))}."
        )
    return f"{' '.join(parts)} All with {placements.setting}, {tuned(placements.points)}."


def _ahead(gaps: pd.DataFrame, maximize: bool) -> str:
    """The set of target modules that is ahead of most others."""
    wins = gaps["first"].where((gaps["gap"] > 0) == maximize, gaps["second"])
    return str(wins.value_counts().idxmax())


def _against(gaps: pd.DataFrame, who: str, metric: str) -> list[str]:
    """How one set stands against each of the others it can be compared with, in words."""
    found = []
    for _, row in gaps[(gaps["first"] == who) | (gaps["second"] == who)].iterrows():
        sign = 1.0 if row["first"] == who else -1.0
        other = row["second"] if row["first"] == who else row["first"]
        low, high = sorted((sign * row["low"], sign * row["high"]))
        text = f"{labels.signed(metric, sign * row['gap'])} against {other}"
        if math.isfinite(low):
            told = "" if low > 0 or high < 0 else ", not told apart"
            text += f" ({labels.signed(metric, low)} to {labels.signed(metric, high)}{told})"
        found.append(text)
    return found


def _count(parameters: float) -> str:
    """A number of parameters to two digits: `37k`, `1.2M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return (
                f"{parameters / size:.2g}{unit}"
                if parameters < 100 * size
                else f"{parameters / size:.0f}{unit}"
            )
    return f"{parameters:.0f}"


FIGURE = Figure(order=40, data=data, draw=draw)
