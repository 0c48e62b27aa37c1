"""Which setting mattered how much: shares of the scores' variance, and of what tells the best
tenth; the seed's own.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from analysis import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.theme import Look, category_styles
from analysis.stats_importance import SEED, importance

NAMES = {
    "fanova": "share of the scores’ variance, alone (fANOVA)",
    "ped_anova": "share of what the best tenth has (PED-ANOVA)",
}
# With fewer runs than this a tree splits on chance as readily as on a setting.
FEW = 30


@dataclass(frozen=True, slots=True)
class Shares:
    """`table`: key (dotted, or seed), fanova, ped_anova, largest first; from `runs` scored runs.

    `interactions` is what no key explains alone, `noise` the share between runs that differ in
    their seed alone (NaN where no two do).
    """

    table: pd.DataFrame
    interactions: float
    noise: float
    runs: int


def data(experiment: Experiment) -> list[Plot]:
    """The shares of every swept key and the seed; none with too few scored runs, or equal
    scores.
    """
    runs = experiment.tables.runs
    scored = runs[~runs["confirm"].astype(bool) & runs["score"].notna()]
    table = importance(scored, experiment.axes, experiment.direction)
    if table.empty:
        return []
    shares = Shares(table, table.attrs["interactions"], table.attrs["noise"], len(scored))
    reading = _reading(shares)
    alt = f"Bar chart of the importance of {labels.plural(len(table), 'setting')}, two bars each."
    return [Plot("importance", "What mattered", reading, f"{alt} {reading}", shares)]


def draw(shares: Shares, figure: Canvas, look: Look) -> None:
    """Two bars per setting, the most important at the top; what lies in combinations is hatched."""
    keys = shares.table["key"].tolist()
    figure.set_size_inches(look.size[0], 0.62 * (len(keys) + 1) + 1.5)
    axes = figure.add_subplot()
    styles = category_styles(list(NAMES), look)
    names = [textwrap.fill(_name(key), 14 if look.narrow else 30) for key in keys]
    places = np.arange(len(keys) + 1)
    for shift, (column, name) in zip((-0.19, 0.19), NAMES.items(), strict=True):
        colour = styles[column][0]
        values = shares.table[column].to_numpy(float)
        axes.barh(places[:-1] + shift, values, 0.34, color=colour, label=name, zorder=3)
        for place, value in zip(places[:-1] + shift, values, strict=True):
            text = f"{value:.0%}" if math.isfinite(value) else "–"
            axes.annotate(
                text,
                (value if math.isfinite(value) else 0.0, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
            )
    axes.barh(
        places[-1] - 0.19,
        shares.interactions,
        0.34,
        color=styles["fanova"][0],
        alpha=0.55,
        hatch="///",
        edgecolor=look.colours["paper"],
        linewidth=0,
        zorder=3,
    )
    axes.annotate(
        f"{shares.interactions:.0%}",
        (shares.interactions, places[-1] - 0.19),
        (3, 0),
        textcoords="offset points",
        va="center",
        fontsize="small",
    )
    axes.set_yticks(places, [*names, "in combination"])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("share")
    figure.legend(loc="outside upper center", ncols=1 if look.narrow else 2, fontsize="small")


def _name(key: str) -> str:
    return "seed" if key == SEED else labels.key(key)


def _reading(shares: Shares) -> str:
    settings = shares.table[shares.table["key"] != SEED]
    each = [f"{_name(row['key'])} {row['fanova']:.0%}" for _, row in settings.iterrows()]
    parts = (
        [f"Of the variance of {shares.runs} scores, alone: {labels.listed(each)}"] if each else []
    )
    parts.append(f"{shares.interactions:.0%} lies in combinations")
    if math.isfinite(shares.noise):
        parts.append(f"{shares.noise:.0%} is chance between seeds")
    text = f"{'; '.join(parts)}."
    seed = shares.table.loc[shares.table["key"] == SEED, "fanova"]
    weak = [
        _name(row["key"])
        for _, row in settings.iterrows()
        if len(seed) and row["fanova"] <= seed.iloc[0]
    ]
    if weak:
        text += (
            f" Not told from chance: {labels.listed(weak)}, no more than the seed's "
            f"{seed.iloc[0]:.0%}."
        )
    if shares.runs < FEW:
        text += f" Rough, with only {shares.runs} runs."
    return text


FIGURE = Figure(order=60, data=data, draw=draw)
