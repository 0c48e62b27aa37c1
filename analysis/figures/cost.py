"""Show what the experiment took: trials over time, the gain of packing, and the time of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.theme import MARKERS, Look
from harness.config.metrics import duration
from harness.records.run_dir import Status

# The members of a pack share these phases; each evaluates by itself.
SHARED = {
    "timing_s/rollout": "rollout",
    "timing_s/logprobs": "log-probabilities",
    "timing_s/update": "update",
    "timing_s/critic": "critic",
    "timing_s/sync": "sync",
    "timing_s/checkpoint": "checkpoint",
}
EVALUATION, OTHER = "evaluation", "other"
# More trials than this are counted over so many periods, not drawn one by one.
MAX_BARS, PERIODS = 60, 80
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclass(frozen=True, slots=True)
class CostData:
    """`spans`: number, status, start and end in seconds from the first start, where known.

    `phases`: seconds by phase over all runs, a pack's time counted once. `packing`: members that
    took a step together, number of such steps, and the median seconds a step took each.
    """

    spans: pd.DataFrame
    phases: pd.Series
    packing: pd.DataFrame

    @property
    def makespan(self) -> float:
        """Seconds from the first trial's start to the last one's end; 0 where not known."""
        return float(self.spans["end"].max()) if len(self.spans) else 0.0


def data(experiment: Experiment) -> list[Plot]:
    """Return the times of all runs; none where no step logged any."""
    tables = experiment.tables
    seconds = _seconds(tables.steps)
    names = [name for name in (*SHARED.values(), EVALUATION, OTHER) if name in seconds.columns]
    phases = seconds[names].sum()
    phases = phases[phases > 0]
    if phases.empty:
        return []
    known = tables.runs.dropna(subset=["started", "ended"]) if experiment.is_sweep else None
    spans = pd.DataFrame(columns=["number", "status", "start", "end"])
    if known is not None:
        times = known[["started", "ended"]] - known["started"].min()
        times = times.rename(columns={"started": "start", "ended": "end"})
        spans = known[["number", "status"]].join(times).reset_index(drop=True)
    chart = CostData(spans, phases, _packing(tables.steps))
    over_time = "" if spans.empty else ", and of the trials over time"
    what = f"Bar chart of the trainer's time by phase{over_time}."
    return [Plot("cost", "What it cost", what, _reading(chart), chart)]


def _seconds(steps: pd.DataFrame) -> pd.DataFrame:
    """Return each row's seconds by phase; what a pack's members share is divided among them."""
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


def _packing(steps: pd.DataFrame) -> pd.DataFrame:
    """Return the steps and the median of their seconds a member, by members together."""
    if not {"perf/members", "step_time"} <= set(steps.columns):
        return pd.DataFrame(columns=["members", "steps", "seconds"])
    taken = steps.dropna(subset=["perf/members", "step_time"])
    members = taken["perf/members"].astype(int).rename("members")
    groups = (taken["step_time"] / taken["perf/members"]).groupby(members)
    table = groups.agg(steps="size", seconds="median").reset_index()
    return table.assign(steps=(table["steps"] / table["members"]).round().astype(int))


def _reading(chart: CostData) -> str:
    parts = []
    if chart.makespan and len(chart.spans) > 1:
        spent = float((chart.spans["end"] - chart.spans["start"]).sum())
        parts.append(
            f"From the first start to the last end {labels.plural(len(chart.spans), 'trial')} took "
            f"{duration(chart.makespan)}, {spent / chart.makespan:.1f} at a time on average."
        )
    if len(chart.packing) and chart.packing["members"].max() > 1:
        most = chart.packing.iloc[-1]
        text = f"A step took {most['seconds']:.2g} s for each of {most['members']:.0f} members"
        alone = chart.packing[chart.packing["members"] == 1]
        if alone.empty:
            parts.append(f"{text}. None was taken alone, so the gain of packing is not known.")
        else:
            single = alone["seconds"].iloc[0]
            parts.append(
                f"{text}, and {single:.2g} s for one alone: {single / most['seconds']:.1f} times. "
                "This is rough, as other trials at other times were alone."
            )
    whole = float(chart.phases.sum())
    top = chart.phases.sort_values(ascending=False).head(2)
    shares = labels.listed([f"{seconds / whole:.0%} into {name}" for name, seconds in top.items()])
    return " ".join([*parts, f"The trainers' {duration(whole)} went {shares}."])


def draw(chart: CostData, figure: Canvas, look: Look) -> None:
    """Draw the trials over time, seconds by phase, and a step's seconds a member."""
    panels = [_phases]
    if len(chart.spans) > 1:
        panels.insert(0, _timeline)
    if len(chart.packing) > 1:
        panels.append(_together)
    if look.narrow:
        figure.set_size_inches(look.size[0], 2.7 * len(panels))
    shape = (len(panels), 1) if look.narrow else (1, len(panels))
    for axes, panel in zip(figure.subplots(*shape, squeeze=False).flat, panels, strict=True):
        panel(axes, chart, look)


def _timeline(axes: Axes, chart: CostData, look: Look) -> None:
    makespan = chart.makespan
    unit, size = next(pair for pair in _UNITS if makespan >= pair[1] * 2 or pair[1] == 1)
    axes.set_xlabel(f"{unit} since the first began")
    axes.set_xlim(0, 1.03 * max(makespan / size, 1e-9))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(chart.spans) > MAX_BARS:
        # The trials that ran at a time, on average over each period.
        edges = np.linspace(0.0, makespan, PERIODS + 1)
        start, end = chart.spans[["start", "end"]].to_numpy(float).T[:, :, None]
        shared = np.minimum(end, edges[1:]) - np.maximum(start, edges[:-1])  # [trials, periods]
        running = np.clip(shared, 0.0, None).sum(axis=0) / np.diff(edges)
        axes.stairs(running, edges / size, fill=True, color=look.first, zorder=3)
        axes.set_ylabel("trials at a time")
        return
    spans = chart.spans.sort_values(["start", "number"], ignore_index=True)
    done = (spans["status"] == Status.COMPLETE.value).to_numpy()
    kinds = ((done, look.first, "complete"), (~done, look.colours["soft"], "not complete"))
    for mask, colour, name in kinds:
        if mask.any():
            rows = spans[mask]
            long, begun = (rows["end"] - rows["start"]) / size, rows["start"] / size
            style: dict[str, Any] = {"color": colour, "linewidth": 0, "label": name}
            axes.barh(rows.index, long, 0.82, begun, zorder=3, **style)
    if not done.all():
        axes.legend(loc="upper right", fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_ylabel("trials, in the order they began")


def _phases(axes: Axes, chart: CostData, look: Look) -> None:
    whole = float(chart.phases.sum())
    places = np.arange(len(chart.phases))
    axes.barh(places, chart.phases / whole, 0.7, color=look.first, linewidth=0, zorder=3)
    for place, seconds in zip(places, chart.phases, strict=True):
        share = seconds / whole
        text = f"{share:.0%}, {duration(seconds)}" if share >= 0.005 else "under 1%"
        offset: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points"}
        axes.annotate(text, (share, place), va="center", fontsize="small", **offset)
    axes.set_yticks(places, [str(name) for name in chart.phases.index])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.65 * float(chart.phases.max()) / whole)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("share of the trainer's time")


def _together(axes: Axes, chart: CostData, look: Look) -> None:
    members, seconds = chart.packing["members"], chart.packing["seconds"]
    axes.plot(members, seconds, color=look.first, marker=MARKERS[0], zorder=3)
    axes.set_xticks(members.tolist())
    axes.set_ylim(0, 1.12 * float(seconds.max()))
    axes.margins(x=0.12)
    axes.set_xlabel("members that take a step together")
    axes.set_ylabel("seconds a step, for each (median)")


FIGURE = Figure(order=70, data=data, draw=draw)
