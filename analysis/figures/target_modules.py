"""Compare target modules where the rest is equal: at the same rank, and at equal parameters."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from analysis.claims.claim import gap
from analysis.claims.evidence import Evidence, Mask
from analysis.claims.matching import ArmPair, equal_parameters, equal_rank
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
)
from analysis.figures.drawing.theme import Look, category_styles, legend
from analysis.stats.effects import Estimate, average

EQUAL_RANK, EQUAL_PARAMETERS = "equal rank", "equal parameters"
_MATCH = {EQUAL_RANK: equal_rank, EQUAL_PARAMETERS: equal_parameters}
# More groups than this have no room for their names on a narrow page.
MAX_GROUPS = 6

Matched = dict[tuple[float, float], list[ArmPair]]


@dataclass(frozen=True, slots=True)
class PlacementData:
    """Arms that can be compared, each at its own best learning rate; `setting` is what they share.

    `points`: panel, group (its name), targets, rank, parameters, score with low and high (95%, NaN
    with one seed), seeds, rates. `gaps`: panel, first, second, pairs, gap (first less second, as
    the metric counts) with low and high.
    """

    points: pd.DataFrame
    gaps: pd.DataFrame
    setting: str
    base: float | None
    metric: str
    maximize: bool

    @property
    def panels(self) -> list[str]:
        """The kinds of pairs there are."""
        return list(dict.fromkeys(self.points["panel"]))


def data(experiment: Experiment) -> list[Plot]:
    """Return the pairs of the first setting that has any; none without two sets of modules."""
    for e, stratum in strata(experiment, "batch", "budget", "alpha"):
        matched = {panel: _matched(e, stratum, panel) for panel in _MATCH}
        if not any(matched.values()):
            continue
        setting = f"alpha {e.alpha[stratum][0]:g}"
        if len(np.unique(e.batch[e.lora])) > 1:
            setting += f", {e.batch[stratum][0]:g} sequences a batch"
        points = [_points(e, panel, pairs) for panel, pairs in matched.items()]
        gaps = [_gap(e, panel, *item) for panel, pairs in matched.items() for item in pairs.items()]
        chart = PlacementData(
            points=pd.concat(points, ignore_index=True),
            gaps=pd.DataFrame(gaps),
            setting=setting,
            base=experiment.base,
            metric=experiment.metric,
            maximize=e.sign > 0,
        )
        where = labels.listed([f"at {panel}" for panel in chart.panels])
        what = f"Dot chart of {labels.metric(experiment.metric)} by target modules {where}."
        reading = _reading(chart) + left_out(experiment)
        return [Plot("target_modules", "Target modules, all else equal", what, reading, chart)]
    return []


def _matched(e: Evidence, stratum: Mask, panel: str) -> Matched:
    """Return the pairs of each two sets of modules, of arms that have a score."""
    codes = np.unique(e.targets[stratum & np.isfinite(e.targets)]).tolist()
    matched = {}
    for one, two in itertools.combinations(codes, 2):
        # An arm has no score when every learning rate has a diverged run.
        pairs = [
            pair
            for pair in _MATCH[panel](e, stratum, one, two)
            if pair.first.arm.eligible.any() and pair.second.arm.eligible.any()
        ]
        if pairs:
            matched[one, two] = pairs
    return matched


def _points(e: Evidence, panel: str, matched: Matched) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for codes, pairs in matched.items():
        for pair in pairs:
            at, group = _group(panel, pair)
            for code, placed in zip(codes, (pair.first, pair.second), strict=True):
                rows.append(
                    {
                        "panel": panel,
                        "at": at,
                        "group": group,
                        "targets": e.target_names[int(code)],
                        "rank": placed.rank,
                        "parameters": placed.parameters,
                        **arm_row(e, placed.arm),
                    }
                )
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows).drop_duplicates(["panel", "group", "targets"])
    kept = sorted(set(zip(table["at"], table["group"], strict=True)))[:MAX_GROUPS]
    table = table[table["group"].isin([group for _, group in kept])]
    return table.sort_values(["at", "group", "targets"], ignore_index=True).drop(columns="at")


def _group(panel: str, pair: ArmPair) -> tuple[float, str]:
    """Return where a pair stands on its panel's axis, and its name there."""
    first, second = pair.first, pair.second
    if panel == EQUAL_RANK:
        return float(first.rank), f"{first.rank}"
    size = math.sqrt(first.parameters * second.parameters)
    ranks = labels.listed([f"{rank}" for rank in sorted({first.rank, second.rank})])
    return size, f"{_count(size)}\nrank {ranks}"


def _gap(
    e: Evidence, panel: str, codes: tuple[float, float], pairs: list[ArmPair]
) -> dict[str, Any]:
    """Return the mean gap over pairs; without an interval where an arm has one seed."""
    arms = [(pair.first.arm, pair.second.arm) for pair in pairs]
    gaps = [effect for pair in arms if (effect := gap(*pair)) is not None]
    if len(gaps) == len(arms):
        mean = average(gaps).scaled(e.sign)
    else:
        apart = [e.best_score(a).value - e.best_score(b).value for a, b in arms]
        mean = Estimate(float(np.mean(apart)), math.nan, math.nan)
    first, second = (e.target_names[int(code)] for code in codes)
    low, high = mean.interval(0.025)
    interval = {"gap": mean.value, "low": low, "high": high}
    return {"panel": panel, "first": first, "second": second, "pairs": len(pairs), **interval}


def _reading(chart: PlacementData) -> str:
    parts = []
    for panel, gaps in chart.gaps.groupby("panel", sort=False):
        # The set of modules that is ahead of most others.
        wins = gaps["first"].where((gaps["gap"] > 0) == chart.maximize, gaps["second"])
        first = str(wins.value_counts().idxmax())
        against = []
        for _, row in gaps[(gaps["first"] == first) | (gaps["second"] == first)].iterrows():
            sign, other = (1.0, "second") if row["first"] == first else (-1.0, "first")
            low, high = sorted((sign * row["low"], sign * row["high"]))
            text = f"{labels.signed(chart.metric, sign * row['gap'])} against {row[other]}"
            if math.isfinite(low):
                ends = [labels.signed(chart.metric, end) for end in (low, high)]
                told = "" if low > 0 or high < 0 else ", not told apart"
                text += f" ({' to '.join(ends)}{told})"
            against.append(text)
        parts.append(f"At {panel} {first} is {labels.listed(against)}.")
    return f"{' '.join(parts)} All with {chart.setting}, {tuned(chart.points)}."


def _count(parameters: float) -> str:
    """Write a number of parameters with two digits: `37k`, `1.2M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            digits = ".2g" if parameters < 100 * size else ".0f"
            return f"{parameters / size:{digits}}{unit}"
    return f"{parameters:.0f}"


def draw(chart: PlacementData, figure: Canvas, look: Look) -> None:
    """Draw a panel for each kind of pair; in a group, a mark for each set of target modules."""
    panels = chart.panels
    names = list(dict.fromkeys(chart.points["targets"]))
    styles = category_styles(sorted(names), look)
    if look.narrow:
        figure.set_size_inches(look.size[0], 2.9 * len(panels) + 0.8)
    shape = (len(panels), 1) if look.narrow else (1, len(panels))
    for axes, panel in zip(np.atleast_1d(figure.subplots(*shape)).flat, panels, strict=True):
        _panel(axes, chart, panel, styles)
        axes.tick_params(axis="x", labelsize="x-small" if look.narrow else "small")
        named = look.narrow or panel == panels[-1]
        base_line(axes, chart.base, chart.metric, look, named=named)
    legend(figure, handles(styles, {name: name for name in styles}, linestyle=""), look)


def _panel(
    axes: Axes, chart: PlacementData, panel: str, styles: dict[Any, tuple[str, str]]
) -> None:
    points = chart.points[chart.points["panel"] == panel]
    groups = list(dict.fromkeys(points["group"]))
    for place, group in enumerate(groups):
        rows = points[points["group"] == group].sort_values("targets")
        width = min(0.24, 0.7 / len(rows))
        for at, (_, row) in enumerate(rows.iterrows()):
            shift = width * (at - (len(rows) - 1) / 2)
            interval_marks(axes, [place + shift], row.to_frame().T, styles[row["targets"]])
    fit_scores(axes, chart.points, chart.base, chart.metric)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("rank" if panel == EQUAL_RANK else "trained parameters")
    axes.set_ylabel(labels.metric(chart.metric))
    axes.set_title(f"at {panel}", fontsize="medium")


FIGURE = Figure(order=40, data=data, draw=draw)
