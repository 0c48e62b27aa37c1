"""What the experiment took: trials over time, what packing them gained, and where the time of a
step went.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.theme import Look, category_styles
from harness.config.metrics import duration
from harness.records.run_dir import Status

# What the members of a pack share; the evaluation's time is each one's own.
SHARED = {
    "timing_s/rollout": "rollout",
    "timing_s/logprobs": "log-probabilities",
    "timing_s/update": "update",
    "timing_s/critic": "critic",
    "timing_s/sync": "sync",
    "timing_s/checkpoint": "checkpoint",
}
EVALUATION, OTHER = "evaluation", "other"
# More trials than this are counted, not drawn one by one; in so many periods.
MAX_BARS, PERIODS = 60, 80
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclass(frozen=True, slots=True)
class Cost:
    """`spans`: number, status, start and end in seconds from the first start, of the trials whose
    times are known.

    `phases`: seconds by phase over all runs, a pack's time counted once. `packing`: members
    together, steps, and the median seconds that a step took each.
    """

    spans: pd.DataFrame
    phases: pd.Series
    packing: pd.DataFrame

    @property
    def makespan(self) -> float | None:
        """Seconds from the first trial's start to the last one's end; None where they are not
        known.
        """
        return float(self.spans["end"].max()) if len(self.spans) else None


def data(experiment: Experiment) -> list[Plot]:
    """The times of all runs; none where no step logged any."""
    tables = experiment.tables
    steps = _shares(tables.steps)
    phases = steps[
        [name for name in (*SHARED.values(), EVALUATION, OTHER) if name in steps.columns]
    ].sum()
    phases = phases[phases > 0]
    if phases.empty:
        return []
    spans = _spans(tables.runs) if experiment.is_sweep else _spans(tables.runs.iloc[:0])
    cost = Cost(spans, phases, _packing(tables.steps))
    reading = _reading(cost)
    alt = (
        "Bar chart of the trainer's time by "
        f"phase{'' if spans.empty else ', and of the trials over time'}."
    )
    return [Plot("cost", "What it cost", reading, f"{alt} {reading}", cost)]


def draw(cost: Cost, figure: Canvas, look: Look) -> None:
    """The trials as bars over time, seconds by phase, and a step's seconds a member by how many
    shared it.
    """
    panels = [_phases]
    if len(cost.spans) > 1:
        panels.insert(0, _timeline)
    if len(cost.packing) > 1:
        panels.append(_together)
    if look.narrow:
        figure.set_size_inches(look.size[0], 2.7 * len(panels))
    shape = (len(panels), 1) if look.narrow else (1, len(panels))
    for axes, panel in zip(figure.subplots(*shape, squeeze=False).flat, panels, strict=True):
        panel(axes, cost, look)


def _timeline(axes: Axes, cost: Cost, look: Look) -> None:
    unit, size = next(
        found for found in _UNITS if (cost.makespan or 0.0) >= found[1] * 2 or found[1] == 1
    )
    axes.set_xlabel(f"{unit} since the first began")
    axes.set_xlim(0, 1.03 * max((cost.makespan or 0.0) / size, 1e-9))
    if len(cost.spans) > MAX_BARS:
        _running(axes, cost.spans, size, look)
    else:
        _trials(axes, cost.spans, size, look)


def _running(axes: Axes, spans: pd.DataFrame, size: int, look: Look) -> None:
    """How many trials ran at a time, on average over each of `PERIODS` periods."""
    edges = np.linspace(0.0, float(spans["end"].max()), PERIODS + 1)
    start, end = spans[["start", "end"]].to_numpy(float).T[:, :, None]
    shared = np.clip(
        np.minimum(end, edges[1:]) - np.maximum(start, edges[:-1]), 0.0, None
    )  # [trials, periods]
    running = shared.sum(axis=0) / np.diff(edges)
    axes.stairs(running, edges / size, fill=True, color=category_styles([0], look)[0][0], zorder=3)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel("trials at a time")


def _trials(axes: Axes, known: pd.DataFrame, size: int, look: Look) -> None:
    """A bar per trial."""
    spans = known.sort_values(["start", "number"], ignore_index=True)
    done = (spans["status"] == Status.COMPLETE.value).to_numpy()
    colour = category_styles([0], look)[0][0]
    for mask, shade, name in (
        (done, colour, "complete"),
        (~done, look.colours["soft"], "not complete"),
    ):
        if mask.any():
            rows = spans[mask]
            long = (rows["end"] - rows["start"]) / size
            axes.barh(
                rows.index,
                long,
                0.82,
                rows["start"] / size,
                color=shade,
                linewidth=0,
                label=name,
                zorder=3,
            )
    if not done.all():
        axes.legend(loc="upper right", fontsize="small")
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", visible=False)
    axes.set_ylabel("trials, in the order they began")


def _phases(axes: Axes, cost: Cost, look: Look) -> None:
    colour, whole = category_styles([0], look)[0][0], float(cost.phases.sum())
    places = np.arange(len(cost.phases))
    axes.barh(places, cost.phases / whole, 0.7, color=colour, linewidth=0, zorder=3)
    for place, seconds in zip(places, cost.phases, strict=True):
        share = seconds / whole
        text = f"{share:.0%}, {duration(seconds)}" if share >= 0.005 else "under 1%"
        axes.annotate(
            text,
            (seconds / whole, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    axes.set_yticks(places, [str(name) for name in cost.phases.index])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.65 * float(cost.phases.max()) / whole)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("share of the trainer's time")


def _together(axes: Axes, cost: Cost, look: Look) -> None:
    colour, marker = category_styles([0], look)[0]
    axes.plot(
        cost.packing["members"], cost.packing["seconds"], color=colour, marker=marker, zorder=3
    )
    axes.set_xticks(cost.packing["members"].tolist())
    axes.set_ylim(0, 1.12 * float(cost.packing["seconds"].max()))
    axes.margins(x=0.12)
    axes.set_xlabel("members that take a step together")
    axes.set_ylabel("seconds a step, for each (median)")


def _shares(steps: pd.DataFrame) -> pd.DataFrame:
    """Each row's own seconds by phase: what a pack's members share is divided among them."""
    members = steps["perf/members"].fillna(1.0) if "perf/members" in steps.columns else 1.0
    known = {key: name for key, name in SHARED.items() if key in steps.columns}
    table = pd.DataFrame(
        {name: steps[key].fillna(0.0) / members for key, name in known.items()}, index=steps.index
    )
    if "step_time" in steps.columns:
        # A checkpoint is written between two steps.
        parts = table.drop(columns="checkpoint", errors="ignore").sum(axis=1)
        table[OTHER] = (steps["step_time"].fillna(0.0) / members - parts).clip(lower=0.0)
    if "timing_s/eval" in steps.columns:
        table[EVALUATION] = steps["timing_s/eval"].fillna(0.0)
    return table


def _spans(runs: pd.DataFrame) -> pd.DataFrame:
    known = runs.dropna(subset=["started", "ended"])
    first = known["started"].min()
    return pd.DataFrame(
        {
            "number": known["number"],
            "status": known["status"],
            "start": known["started"] - first,
            "end": known["ended"] - first,
        }
    ).reset_index(drop=True)


def _packing(steps: pd.DataFrame) -> pd.DataFrame:
    """By how many members took a step together: the steps, and the median of their seconds a
    member.
    """
    if not {"perf/members", "step_time"} <= set(steps.columns):
        return pd.DataFrame(columns=["members", "steps", "seconds"])
    taken = steps.dropna(subset=["perf/members", "step_time"])
    each = taken["step_time"] / taken["perf/members"]
    groups = each.groupby(taken["perf/members"].astype(int))
    table = (
        pd.DataFrame({"steps": groups.size(), "seconds": groups.median()})
        .rename_axis("members")
        .reset_index()
    )
    return table.assign(steps=(table["steps"] / table["members"]).round().astype(int))


def _reading(cost: Cost) -> str:
    whole = float(cost.phases.sum())
    parts = []
    if cost.makespan and len(cost.spans) > 1:
        spent = float((cost.spans["end"] - cost.spans["start"]).sum())
        parts.append(
            f"From the first start to the last end {labels.plural(len(cost.spans), 'trial')} took "
            f"{duration(cost.makespan)}, {spent / cost.makespan:.1f} at a time on average."
        )
    if gain := _gain(cost.packing):
        parts.append(gain)
    top = cost.phases.sort_values(ascending=False).head(2)
    shares = labels.listed([f"{seconds / whole:.0%} into {name}" for name, seconds in top.items()])
    parts.append(f"The trainers' {duration(whole)} went {shares}.")
    return " ".join(parts)


def _gain(packing: pd.DataFrame) -> str:
    """What packing gained by this experiment's own steps; nothing where no members shared any."""
    if packing.empty or packing["members"].max() == 1:
        return ""
    most = packing.iloc[-1]
    together = (
        f"A step took {most['seconds']:.2g} s for each of {most['members']:.0f} members together"
    )
    alone = packing[packing["members"] == 1]
    if alone.empty:
        return f"{together}; none was taken alone, so what packing gained is not known here."
    gain = alone["seconds"].iloc[0] / most["seconds"]
    return (
        f"{together}, {alone['seconds'].iloc[0]:.2g} s for one alone: {gain:.1f} times, "
        "roughly, for those were other "
        "trials at other times."
    )


FIGURE = Figure(order=70, data=data, draw=draw)
