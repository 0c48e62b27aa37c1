"""Score by rank and learning rate, and by alpha and learning rate, with lines on which alpha·lr is
the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, NullLocator

from analysis.claims.evidence import Evidence
from analysis.claims.rates import exponent, located
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.cells import configurations, each, edges, octaves, rate_columns
from analysis.figures.drawing.theme import Look, log_axis
from analysis.stats.effects import Estimate
from harness.config import metrics

# Neighbouring lines of equal alpha·lr are this factor apart.
LINE_STEP = math.sqrt(10)


@dataclass(frozen=True, slots=True)
class Cells:
    """`cells` has value (rank or alpha), lr (of the column), mean, low, high, n of the best
    configuration there.

    `diverged` has value, lr, runs of the diverged ones. `lines` has the constant and a value and a
    rate per point of each line of equal alpha·lr, the best cell's first; none where alpha does not
    vary.
    """

    key: str
    cells: pd.DataFrame
    diverged: pd.DataFrame
    lines: pd.DataFrame
    best: pd.Series
    metric: str


def data(experiment: Experiment) -> list[Plot]:
    """A heatmap of rank and one of alpha, where it and the learning rate were swept."""
    if labels.LR not in experiment.axes:
        return []
    plots = [
        _plot(experiment, key) for key in (labels.RANK, labels.ALPHA) if key in experiment.axes
    ]
    return [plot for plot in plots if plot is not None]


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
    found = Cells(key, cells, diverged, _lines(key, table, best), best, experiment.metric)
    binned = not np.allclose(rates[: len(table)], table["exact"], rtol=1e-4)
    reading = _reading(experiment, found, binned)
    what = f"{labels.metric(experiment.metric)} by {name} and learning rate"
    alt = f"Heatmap of {what}, {labels.plural(len(cells), 'cell')}. {reading}"
    return Plot(f"heatmap_{name}", f"Score by {name} and learning rate", reading, alt, found)


def _lines(key: str, table: pd.DataFrame, best: pd.Series) -> pd.DataFrame:
    """Points of the lines of equal alpha·lr; of ranks only where each has one alpha, and not all
    the same.
    """
    alphas = table["value"] if key == labels.ALPHA else table["alpha"]
    by_value = (
        pd.DataFrame({"value": table["value"], "alpha": alphas})
        .dropna()
        .drop_duplicates()
        .sort_values("value")
    )
    none = pd.DataFrame(columns=["constant", "value", "lr"])
    if by_value["value"].duplicated().any() or by_value["alpha"].nunique() < 2:
        return none
    own = by_value.loc[by_value["value"] == best["value"], "alpha"]
    if own.empty:
        return none
    constants = [
        float(own.iloc[0] * best["lr"] * LINE_STEP**k) for k in (0, -4, -3, -2, -1, 1, 2, 3, 4)
    ]
    parts = [
        by_value.assign(constant=constant, lr=constant / by_value["alpha"])
        for constant in constants
    ]
    return pd.concat(parts, ignore_index=True)[["constant", "value", "lr"]]


def _reading(experiment: Experiment, found: Cells, binned: bool) -> str:
    best, metric = found.best, experiment.metric
    at = f"{labels.setting(found.key, best['value'])} at {labels.lr(best['exact'])}"
    score = labels.score(metric, best["mean"])
    parts = [
        (
            f"The best of {labels.plural(len(found.cells), 'cell')} is {at}: {score} "
            f"({labels.plural(best['n'], 'seed')})"
        )
    ]
    if np.isfinite(best["low"]):
        near = (
            int(
                ((found.cells["mean"] >= best["low"]) & (found.cells["mean"] <= best["high"])).sum()
            )
            - 1
        )
        interval = f"{labels.score(metric, best['low'])} to {labels.score(metric, best['high'])}"
        others = f"{near} more {'is' if near == 1 else 'are'}" if near else "no other is"
        parts[0] += f"; {others} within its {best['source']}, {interval}"
    parts[0] += "."
    if len(set(experiment.axes) - {found.key, labels.LR}):
        parts.append("A cell shows its best configuration, so other settings differ between cells.")
    if binned:
        parts.append("Learning rates are put together by thirds of a decade.")
    if found.key == labels.ALPHA:
        parts.append(_alpha_words(experiment))
    return " ".join(parts)


def _alpha_words(experiment: Experiment) -> str:
    e = experiment.evidence
    slope = None if e is None else exponent_of_alpha(e)
    if slope is None:
        return (
            "Whether the best rate goes as 1/alpha cannot be told: too few alphas with "
            "a located best rate."
        )
    low, high = (f"{end:+.2f}".replace("-", "−") for end in slope.interval(0.025))
    inside = slope.interval(0.025)[0] <= -1 <= slope.interval(0.025)[1]
    value = f"{slope.value:+.2f}".replace("-", "−")
    return (
        f"The best rate goes as alpha to the power {value} (95% {low} to {high}); −1, "
        "along the lines of equal "
        f"alpha·lr, is {'within' if inside else 'outside'}."
    )


def exponent_of_alpha(e: Evidence) -> Estimate | None:
    """The exponent of alpha in the best rate, all else equal, at the setting with most alphas whose
    rate is located.
    """
    found: list[dict[float, Estimate]] = []
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "rank"):
        arms = {
            float(alpha): e.arm(stratum & (e.alpha == alpha))
            for alpha in np.unique(e.alpha[stratum])
        }
        found.append(located({alpha: arm for alpha, arm in arms.items() if arm is not None})[0])
    most = max(found, key=len, default={})
    return exponent(most)[0] if len(most) > 1 else None


def draw(found: Cells, figure: Canvas, look: Look) -> None:
    """A coloured cell per value and rate, its score in it; a cross where runs diverged; lines of
    equal alpha·lr.
    """
    axes = figure.add_subplot()
    axes.set_xscale("log")
    cells, places = found.cells, _places(found)
    colours = ScalarMappable(
        Normalize(float(cells["mean"].min()), float(cells["mean"].max())), _sequence(found, look)
    )
    for cell in each(places):
        if np.isfinite(cell.mean):
            style: dict[str, Any] = {
                "norm": colours.norm,
                "cmap": colours.cmap,
                "edgecolors": "face",
                "linewidth": 0.2,
            }
            axes.pcolormesh(
                [cell.left, cell.right], [cell.bottom, cell.top], [[cell.mean]], **style
            )
    _texts(axes, found, places, colours, look)
    handles = _iso_lines(axes, found, octaves(places["value"].tolist()), look)
    if len(found.diverged):
        ink = look.colours["soft"]
        handles.append(
            Line2D([], [], color=ink, marker="X", linestyle="", label="some runs diverged")
        )
    side: Any = "top" if look.narrow else "right"
    bar = figure.colorbar(colours, ax=axes, label=labels.metric(found.metric), location=side)
    bar.outline.set_visible(False)
    axes.set_xlim(places["left"].min(), places["right"].max())
    axes.set_ylim(places["bottom"].min(), places["top"].max())
    rates = sorted(places["lr"].unique())
    log_axis(axes.xaxis, look, (rates[0], rates[-1]), labels.lr)
    apart = np.diff(np.log10(rates)).min() / math.log10(
        places["right"].max() / places["left"].min()
    )
    if apart > (0.16 if look.narrow else 0.07):
        axes.xaxis.set_major_locator(FixedLocator(rates))
    axes.xaxis.set_minor_locator(NullLocator())
    names = {0.0: "full"} if found.key == labels.RANK else {}
    rows = places.drop_duplicates("value")
    axes.set_yticks(
        rows["row"].tolist(), [names.get(value, f"{value:g}") for value in rows["value"]]
    )
    axes.grid(visible=False)
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel(f"{labels.key(found.key)} (log scale)")
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=2 if look.narrow else 3,
            fontsize="small",
        )


def _places(found: Cells) -> pd.DataFrame:
    """A row per cell: value, lr, mean (NaN where all diverged), runs diverged, its row's place and
    its borders.
    """
    keys = ["value", "lr"]
    cells = (
        found.cells[[*keys, "mean"]]
        .astype(float)
        .merge(found.diverged.astype(float), on=keys, how="outer")
    )
    steps = np.diff(np.log10(np.unique(cells["lr"])))
    rows = octaves(sorted(cells["value"].unique()))
    heights = dict(zip(rows, edges(list(rows.values())), strict=True))
    parts = []
    for value in rows:
        row = cells[cells["value"] == value].sort_values("lr")
        borders = 10 ** np.array(edges(np.log10(row["lr"]).tolist(), alone=float(steps.min())))
        low, high = heights[value]
        parts.append(
            row.assign(
                left=borders[:, 0], right=borders[:, 1], bottom=low, top=high, row=rows[value]
            )
        )
    return pd.concat(parts, ignore_index=True)


def _sequence(found: Cells, look: Look) -> Colormap:
    """Brighter is better on a dark page, darker on a light one: the best stands out from
    the page.
    """
    maximize = metrics.direction(found.metric) == "maximize"
    return look.sequence if maximize == look.dark else look.sequence.reversed()


def _texts(
    axes: Axes, found: Cells, places: pd.DataFrame, colours: ScalarMappable, look: Look
) -> None:
    """Each cell's score, and a cross above it where runs diverged; no scores where they would not
    fit.
    """
    share = metrics.lookup(found.metric).unit == "share"
    width = np.log(places["right"].max() / places["left"].min())
    narrowest = np.log(places["right"] / places["left"]).min() / width
    room = narrowest > (0.07 if look.narrow else 0.05)
    # In points: as far above the score as a row of so many leaves room for.
    raised = min(
        9.0 if look.narrow else 13.0, (55.0 if look.narrow else 95.0) / places["row"].nunique()
    )
    for cell in each(places):
        ink = look.colours["soft"]
        known = bool(np.isfinite(cell.mean))
        if known:
            red, green, blue, _ = colours.to_rgba(np.asarray(cell.mean))
            ink = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
        if known and room:
            text = (
                (f"{cell.mean:.2f}".lstrip("0") if look.narrow else f"{cell.mean:.3f}")
                if share
                else f"{cell.mean:.3g}"
            )
            axes.text(
                cell.lr,
                cell.row,
                text,
                ha="center",
                va="center",
                color=ink,
                fontsize=6 if look.narrow else 8,
                zorder=4,
            )
        if cell.runs > 0:
            above = raised if known and room else 0
            axes.annotate(
                "✕",
                (cell.lr, cell.row),
                xytext=(0, above),
                textcoords="offset points",
                ha="center",
                va="center",
                color=ink,
                fontsize=7,
                zorder=5,
            )


def _iso_lines(axes: Axes, found: Cells, rows: dict[float, float], look: Look) -> list[Line2D]:
    handles = []
    for place, (constant, line) in enumerate(found.lines.groupby("constant", sort=False)):
        points = line["lr"].to_numpy(float), [rows[float(value)] for value in line["value"]]
        style: dict[str, Any] = {
            "color": look.colours["ink"],
            "linestyle": "-" if place == 0 else (0, (2, 3)),
        }
        # The page's colour around it keeps a line visible on a cell of any colour.
        halo = [Stroke(linewidth=2.6, foreground=look.colours["paper"], alpha=0.7), Normal()]
        axes.plot(
            *points,
            **style,
            linewidth=1.3,
            alpha=0.9 if place == 0 else 0.6,
            path_effects=halo,
            zorder=3,
        )
        if place < 2:
            text = f"alpha·lr = {constant:.2g}" if place == 0 else "a factor of √10 apart"
            handles.append(Line2D([], [], **style, linewidth=1.3, label=text))
    return handles


FIGURE = Figure(order=35, data=data, draw=draw, dark_apart=True)
