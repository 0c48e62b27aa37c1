"""Draw and describe scores with their intervals, as several figures do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from analysis.claims.arm import Arm
from analysis.claims.evidence import Column, Evidence, Mask, contexts
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures.drawing.theme import Look
from harness.config import metrics

# A wide interval widens the axis by at most this share of the scores' span.
REACH = 0.35


def each(table: pd.DataFrame) -> Iterator[Any]:
    """Yield the rows of a table, with a value by its column's name."""
    yield from table.itertuples(index=False)


def configurations(experiment: Experiment) -> pd.DataFrame:
    """Return the configurations with a score, best mean first, with their rank, alpha and lr."""
    runs = experiment.tables.runs.dropna(subset=["configuration", "rank", "lr"])
    settings = runs.groupby("configuration")[["rank", "alpha", "lr"]].first()
    names = ["configuration", "n", "whole", "mean", "low", "high", "source"]
    table = experiment.configurations[names].merge(
        settings, left_on="configuration", right_index=True
    )
    table = table[table["n"] > 0].astype({"rank": int, "n": int, "lr": float, "alpha": float})
    # Sorted again, because those without all their seeds come last there, whatever their mean.
    ascending = experiment.direction == "minimize"
    return table.sort_values("mean", ascending=ascending, kind="stable", ignore_index=True)


def run_names(experiment: Experiment) -> dict[str, str]:
    """Return a name for each run by its directory: its trial, swept settings and seed."""
    names = {}
    for _, run in experiment.tables.runs.iterrows():
        swept = labels.settings({key: run[key] for key in experiment.axes if pd.notna(run[key])})
        parts = [swept, "" if pd.isna(run["seed"]) else f"seed {int(run['seed'])}"]
        name = "the run" if pd.isna(run["number"]) else f"trial {int(run['number'])}"
        names[str(run["run_dir"])] = f"{name}: {', '.join(part for part in parts if part)}"
    return names


def strata(experiment: Experiment, *keys: Column) -> Iterator[tuple[Evidence, Mask]]:
    """Yield the comparable runs, and the parts of the adapters among them that agree in `keys`."""
    e = experiment.evidence
    if e is not None:
        yield from ((e, stratum) for stratum in e.strata(e.lora, *keys))


def besides(e: Evidence, stratum: Mask) -> str:
    """Say what else the runs of a stratum share, where the sweep has several values of it."""
    words = ""
    targets = np.unique(e.targets[stratum])
    if len(np.unique(e.targets[np.isfinite(e.targets)])) > 1 and len(targets) == 1:
        words += f" on {e.target_names[int(targets[0])]}"
    if len(np.unique(e.batch[np.isfinite(e.batch)])) > 1:
        words += f" with batches of {e.batch[stratum][0]:g}"
    return words


def left_out(experiment: Experiment) -> str:
    """Say how many runs cannot be compared, as they differ in other settings; empty for none."""
    known = experiment.tables.runs["context"].dropna()
    others = int((~known.isin(contexts(experiment.tables.runs)[:1])).sum())
    if not others:
        return ""
    verbs = (
        "differs in other settings and is" if others == 1 else "differ in other settings and are"
    )
    return f" {labels.plural(others, 'run')} of {len(known)} {verbs} left out."


def arm_row(e: Evidence, arm: Arm) -> dict[str, Any]:
    """Return an arm's best score with its interval, its seeds and its number of learning rates."""
    best, rates = e.best_score(arm), int(arm.eligible.sum())
    interval = {"score": best.value, "low": best.low, "high": best.high}
    return {**interval, "seeds": arm.seeds, "rates": rates}


def tuned(points: pd.DataFrame) -> str:
    """Say how many learning rates the arms chose from, and how sure their scores are."""
    few, many = int(points["rates"].min()), int(points["rates"].max())
    count = f"{few}" if few == many else f"{few} to {many}"
    seeds = int(points["seeds"].min())
    chance = f"95% intervals over {seeds} seeds" if seeds > 1 else "with one seed, without interval"
    return f"each at the best of its {count} learning rates; {chance}"


def with_interval(metric: str, value: float, low: float, high: float) -> str:
    """Write a score with its interval in brackets, if it has one."""
    text = labels.score(metric, value)
    return f"{text} ({labels.score_range(metric, low, high)})" if np.isfinite(low) else text


def handles(styles: Mapping[Any, tuple[str, str]], names: Mapping[Any, str], **style: Any) -> list:
    """Return a legend's handle for each name, by its colour and marker."""
    return [
        Line2D([], [], color=styles[key][0], marker=styles[key][1], label=name, **style)
        for key, name in names.items()
    ]


def base_line(
    axes: Axes, base: float | None, metric: str, look: Look, *, named: bool = True
) -> None:
    """Draw the base model's score as a line, with its name outside of the axes at the right."""
    if base is None:
        return
    soft = look.colours["soft"]
    axes.axhline(base, color=soft, linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
    axes.annotate(
        f"base\n{labels.score(metric, base)}" if named else "",
        (1.0, base),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=soft,
        fontsize="small",
    )


def interval_marks(
    axes: Axes,
    places: Sequence[float] | NDArray[np.float64],
    points: pd.DataFrame,
    style: tuple[str, str],
) -> None:
    """Draw the `score` of each row as a mark, with a line from `low` to `high` where known."""
    colour, marker = style
    ends = points[["low", "high"]].to_numpy(float)
    known = np.isfinite(ends).all(axis=1)
    x = np.asarray(places)[known]
    axes.vlines(x, ends[known, 0], ends[known, 1], color=colour, linewidth=1.6, zorder=3)
    size = 90 if marker == "*" else 44  # a star looks smaller than other marks
    axes.scatter(
        places, points["score"], marker=marker, s=size, color=colour, linewidths=0, zorder=4
    )


def fit_scores(axes: Axes, points: pd.DataFrame, base: float | None, metric: str) -> None:
    """Limit the vertical axis to the scores, the base and the near part of the intervals."""
    scores = np.append(points["score"].to_numpy(float), [] if base is None else base)
    bottom, top = float(np.nanmin(scores)), float(np.nanmax(scores))
    span = max(top - bottom, 0.02 * max(abs(bottom), abs(top)), 1e-9)
    low, high = bottom - REACH * span, top + REACH * span
    ends = points[["low", "high"]].to_numpy(float)
    ends = np.clip(ends[np.isfinite(ends).all(axis=1)], low, high)
    low, high = (min(bottom, *ends[:, 0]), max(top, *ends[:, 1])) if len(ends) else (bottom, top)
    margin = 0.08 * (high - low if high > low else span)
    low, high = low - margin, high + margin
    if metrics.lookup(metric).unit == "share":
        low, high = max(low, -0.03), min(high, 1.03)
    axes.set_ylim(low, high)
