"""Show the score by rank or alpha and learning rate, with lines of equal alpha·lr."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, NullLocator

from analysis.claims.evidence import Evidence
from analysis.claims.rates import exponent, located
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.grid import edges, octaves, rate_columns
from analysis.figures.drawing.marks import configurations, each
from analysis.figures.drawing.theme import Look, log_axis
from analysis.stats.effects import Estimate
from harness.config import metrics

# Neighbouring lines of equal alpha·lr are this factor apart.
LINE_STEP = math.sqrt(10)


@dataclass(frozen=True, slots=True)
class HeatmapData:
    """`cells`: value (rank or alpha), lr (of the column), mean, low, high, n of the best there.

    `diverged`: value, lr, number of diverged runs. `lines`: constant, and a value and a rate per
    point of each line of equal alpha·lr, the best cell's first; empty where alpha does not vary.
    """

    key: str
    cells: pd.DataFrame
    diverged: pd.DataFrame
    lines: pd.DataFrame
    best: pd.Series
    metric: str


def data(experiment: Experiment) -> list[Plot]:
    """Return a heatmap of rank and one of alpha, where it and the learning rate were swept."""
    if labels.LR not in experiment.axes:
        return []
    keys = [key for key in (labels.RANK, labels.ALPHA) if key in experiment.axes]
    return [plot for key in keys if (plot := _plot(experiment, key)) is not None]


def _plot(experiment: Experiment, key: str) -> Plot | None:
    name = labels.key(key)
    table = configurations(experiment).rename(columns={name: "value"}).dropna(subset=["value"])
    runs = experiment.tables.runs.dropna(subset=[name, "lr"])
    values = pd.concat([table["value"], runs[name]], ignore_index=True).astype(float)
    rates = rate_columns(pd.concat([table["lr"], runs["lr"]], ignore_index=True), values)
    table = table.assign(exact=table["lr"], lr=rates[: len(table)].to_numpy())
    cells = table.drop_duplicates(["value", "lr"])
    if cells["value"].nunique() < 2 or cells["lr"].nunique() < 2:
        return None
    wild = runs.assign(value=runs[name].astype(float), lr=rates[len(table) :].to_numpy())
    wild = wild[wild["diverged"].fillna(False).astype(bool)]
    diverged = wild.groupby(["value", "lr"]).size().rename("runs").reset_index()
    best = cells.iloc[0]
    lines = _lines(key, table, best)
    chart = HeatmapData(key, cells, diverged, lines, best, experiment.metric)
    binned = not np.allclose(rates[: len(table)], table["exact"], rtol=1e-4)
    what = (
        f"Heatmap of {labels.metric(experiment.metric)} by {name} and learning rate, "
        f"{labels.plural(len(cells), 'cell')}."
    )
    title = f"Score by {name} and learning rate"
    return Plot(f"heatmap_{name}", title, what, _reading(experiment, chart, binned), chart)


def _lines(key: str, table: pd.DataFrame, best: pd.Series) -> pd.DataFrame:
    """Return the points of the lines of equal alpha·lr.

    Ranks have such lines only where each has one alpha, and not all the same.
    """
    alphas = table["value"] if key == labels.ALPHA else table["alpha"]
    by_value = pd.DataFrame({"value": table["value"], "alpha": alphas}).dropna().drop_duplicates()
    by_value = by_value.sort_values("value")
    alpha = by_value.loc[by_value["value"] == best["value"], "alpha"]
    ambiguous = by_value["value"].duplicated().any() or by_value["alpha"].nunique() < 2
    if ambiguous or alpha.empty:
        return pd.DataFrame(columns=["constant", "value", "lr"])
    parts = []
    for step in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        constant = float(alpha.iloc[0] * best["lr"] * LINE_STEP**step)
        parts.append(by_value.assign(constant=constant, lr=constant / by_value["alpha"]))
    return pd.concat(parts, ignore_index=True)[["constant", "value", "lr"]]


def _reading(experiment: Experiment, chart: HeatmapData, binned: bool) -> str:
    best, cells, metric = chart.best, chart.cells, experiment.metric
    text = (
        f"The best of {labels.plural(len(cells), 'cell')} is "
        f"{labels.setting(chart.key, best['value'])} at {labels.lr(best['exact'])}: "
        f"{labels.score(metric, best['mean'])} "
        f"({labels.plural(best['n'], 'seed')})"
    )
    if np.isfinite(best["low"]):
        near = int(cells["mean"].between(best["low"], best["high"]).sum()) - 1
        others = f"{near} more {'is' if near == 1 else 'are'}" if near else "no other is"
        interval = labels.score_range(metric, best["low"], best["high"])
        text += f"; {others} within its {best['source']}, {interval}"
    parts = [f"{text}."]
    if len(set(experiment.axes) - {chart.key, labels.LR}):
        parts.append("A cell shows its best configuration, so other settings differ between cells.")
    if binned:
        parts.append("Learning rates are grouped by thirds of a decade.")
    if chart.key == labels.ALPHA:
        parts.append(_alpha_words(experiment.evidence))
    return " ".join(parts)


def _alpha_words(e: Evidence | None) -> str:
    slope = None if e is None else exponent_of_alpha(e)
    if slope is None:
        return (
            "Whether the best rate goes as 1/alpha is not known: too few alphas have a located "
            "best rate."
        )
    low, high = slope.interval(0.025)
    value, *ends = (f"{end:+.2f}".replace("-", "−") for end in (slope.value, low, high))
    return (
        f"The best rate goes as alpha to the power {value} (95% interval {' to '.join(ends)}). "
        f"−1, along the lines of equal alpha·lr, is {'inside' if low <= -1 <= high else 'outside'}."
    )


def exponent_of_alpha(e: Evidence) -> Estimate | None:
    """Return the exponent of alpha in the best rate, at the setting with most located rates."""
    rates: list[dict[float, Estimate]] = []
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "rank"):
        arms = {}
        for alpha in np.unique(e.alpha[stratum]):
            arm = e.arm(stratum & (e.alpha == alpha))
            if arm is not None:
                arms[float(alpha)] = arm
        rates.append(located(arms)[0])
    most = max(rates, key=len, default={})
    return exponent(most)[0] if len(most) > 1 else None


def draw(chart: HeatmapData, figure: Canvas, look: Look) -> None:
    """Draw a coloured cell for each value and rate, with a cross where runs diverged."""
    axes = figure.add_subplot()
    axes.set_xscale("log")
    cells, places = chart.cells, _places(chart)
    # The best stands out from the page: darker on a light one, brighter on a dark one.
    maximize = metrics.direction(chart.metric) == "maximize"
    sequence = look.sequence if maximize == look.dark else look.sequence.reversed()
    scale = Normalize(float(cells["mean"].min()), float(cells["mean"].max()))
    colours = ScalarMappable(scale, sequence)
    style: dict[str, Any] = {"norm": colours.norm, "cmap": colours.cmap, "edgecolors": "face"}
    for cell in each(places[np.isfinite(places["mean"])]):
        x, y = [cell.left, cell.right], [cell.bottom, cell.top]
        axes.pcolormesh(x, y, [[cell.mean]], linewidth=0.2, **style)
    _draw_texts(axes, chart, places, colours, look)
    handles = _draw_lines(axes, chart, octaves(places["value"].tolist()), look)
    if len(chart.diverged):
        cross: dict[str, Any] = {"marker": "X", "linestyle": "", "color": look.colours["soft"]}
        handles.append(Line2D([], [], label="some runs diverged", **cross))
    side: Any = "top" if look.narrow else "right"
    bar = figure.colorbar(colours, ax=axes, label=labels.metric(chart.metric), location=side)
    bar.outline.set_visible(False)
    axes.set_xlim(places["left"].min(), places["right"].max())
    axes.set_ylim(places["bottom"].min(), places["top"].max())
    rates = sorted(places["lr"].unique())
    log_axis(axes.xaxis, look, (rates[0], rates[-1]), labels.lr)
    width = math.log10(places["right"].max() / places["left"].min())
    if np.diff(np.log10(rates)).min() / width > (0.16 if look.narrow else 0.07):
        axes.xaxis.set_major_locator(FixedLocator(rates))
    axes.xaxis.set_minor_locator(NullLocator())
    rows = places.drop_duplicates("value")
    full = chart.key == labels.RANK
    names = ["full" if full and value == 0 else f"{value:g}" for value in rows["value"]]
    axes.set_yticks(rows["row"].tolist(), names)
    axes.grid(visible=False)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel(f"{labels.key(chart.key)} (log scale)")
    if handles:
        columns = 2 if look.narrow else 3
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize="small")


def _places(chart: HeatmapData) -> pd.DataFrame:
    """Return a row per cell: value, lr, mean, runs (diverged ones), its row and borders."""
    keys = ["value", "lr"]
    cells = chart.cells[[*keys, "mean"]].astype(float)
    cells = cells.merge(chart.diverged.astype(float), on=keys, how="outer")
    step = float(np.diff(np.log10(np.unique(cells["lr"]))).min())
    rows = octaves(sorted(cells["value"].unique()))
    parts = []
    for value, (low, high) in zip(rows, edges(list(rows.values())), strict=True):
        row = cells[cells["value"] == value].sort_values("lr")
        borders = 10 ** np.array(edges(np.log10(row["lr"]).tolist(), alone=step))
        columns = {"left": borders[:, 0], "right": borders[:, 1]}
        parts.append(row.assign(bottom=low, top=high, row=rows[value], **columns))
    return pd.concat(parts, ignore_index=True)


def _draw_texts(
    axes: Axes, chart: HeatmapData, places: pd.DataFrame, colours: ScalarMappable, look: Look
) -> None:
    """Draw each cell's score where it fits, and a cross above it where runs diverged."""
    share = metrics.lookup(chart.metric).unit == "share"
    width = np.log(places["right"].max() / places["left"].min())
    narrowest = np.log(places["right"] / places["left"]).min() / width
    room = narrowest > (0.07 if look.narrow else 0.05)
    # In points: how far above the score the height of a row leaves room.
    most, height = (9.0, 55.0) if look.narrow else (13.0, 95.0)
    raised = min(most, height / places["row"].nunique())
    centred: dict[str, Any] = {"ha": "center", "va": "center"}
    for cell in each(places):
        ink, known = look.colours["soft"], bool(np.isfinite(cell.mean))
        if known:
            red, green, blue, _ = colours.to_rgba(np.asarray(cell.mean))
            ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
        if known and room:
            text = f"{cell.mean:.3f}" if share else f"{cell.mean:.3g}"
            if share and look.narrow:
                text = f"{cell.mean:.2f}".lstrip("0")
            size = 6 if look.narrow else 8
            axes.text(cell.lr, cell.row, text, color=ink, fontsize=size, zorder=4, **centred)
        if cell.runs > 0:
            axes.annotate(
                "✕",
                (cell.lr, cell.row),
                xytext=(0, raised if known and room else 0),
                textcoords="offset points",
                color=ink,
                fontsize=7,
                zorder=5,
                **centred,
            )


def _draw_lines(
    axes: Axes, chart: HeatmapData, rows: dict[float, float], look: Look
) -> list[Line2D]:
    """Draw the lines of equal alpha·lr; return their legend."""
    handles = []
    # A halo of the page's colour keeps a line visible on a cell of any colour.
    halo = [Stroke(linewidth=2.6, foreground=look.colours["paper"], alpha=0.7), Normal()]
    for place, (constant, line) in enumerate(chart.lines.groupby("constant", sort=False)):
        points = line["lr"].to_numpy(float), [rows[float(value)] for value in line["value"]]
        style: dict[str, Any] = {"color": look.colours["ink"], "linewidth": 1.3}
        style["linestyle"] = "-" if place == 0 else (0, (2, 3))
        alpha = 0.9 if place == 0 else 0.6
        axes.plot(*points, alpha=alpha, path_effects=halo, zorder=3, **style)
        if place < 2:
            text = f"alpha·lr = {constant:.2g}" if place == 0 else "a factor of √10 apart"
            handles.append(Line2D([], [], label=text, **style))
    return handles


FIGURE = Figure(order=35, data=data, draw=draw, dark_apart=True)
