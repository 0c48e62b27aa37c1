"""Health of training over steps: small multiples of the leading configurations, whatever of them
was logged.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot
from analysis.figures.drawing.theme import Look, category_styles

MAX_CONFIGURATIONS, MAX_POINTS = 4, 60
_GAP = "sampling/sampling_logp_difference"
TITLES = {
    "kl": "KL to the base (nats)",
    "kl_in_reward": "KL in rewards (nats)",
    "entropy": "entropy (nats)",
    "completions/mean_length": "length (tokens)",
    "frac_reward_zero_std": "groups without signal",
    f"{_GAP}/mean": "sampler gap, mean (nats)",
    f"{_GAP}/max": "sampler gap, max (nats)",
    "lora/norm_A": "‖A‖",
    "lora/norm_B": "‖B‖",
    "lora/effective_rank": "effective rank of BA",
}
# The mean gap of log-probabilities at which the engine no longer samples the policy that is
# trained.
LARGEST_GAP = 0.02
# An entropy below this share of its beginning has collapsed; more groups without signal than this
# waste the batch.
COLLAPSED, WASTED = 0.1, 0.5


@dataclass(frozen=True, slots=True)
class Health:
    """`lines`: configuration, metric, step, mean over seeds with the smallest (low) and largest
    (high), thinned out.

    `names` has the configurations in words, the best first; -1 is a single run. `ranked`: the first
    has all its seeds.
    """

    lines: pd.DataFrame
    names: dict[int, str]
    ranked: bool

    def metrics(self) -> list[str]:
        """The metrics that were logged, in the order of their panels."""
        logged = set(self.lines["metric"])
        return [name for name in TITLES if name in logged]


def data(experiment: Experiment) -> list[Plot]:
    """What was logged of `TITLES` at two steps or more by the leading configurations; none where
    nothing was.
    """
    steps = experiment.steps
    leading = _leading(experiment)
    table = steps.assign(configuration=steps["configuration"].fillna(-1).astype(int))
    table = table[table["configuration"].isin(list(leading)) & ~table["confirm"].astype(bool)]
    logged = [name for name in TITLES if name in table.columns]
    if not logged:
        return []
    long = table.melt(["configuration", "step"], logged, "metric", "value").dropna(subset=["value"])
    groups = long.groupby(["configuration", "metric", "step"])["value"]
    lines = groups.agg(mean="mean", low="min", high="max").reset_index()
    lines = lines[lines.groupby(["configuration", "metric"])["step"].transform("size") > 1]
    if lines.empty:
        return []
    lines = _thinned(lines.assign(step=lines["step"].astype(int)))
    shown = {name: words for name, words in leading.items() if name in set(lines["configuration"])}
    best = experiment.best
    health = Health(lines, shown, best is not None and best.configuration in shown)
    reading = _reading(health)
    alt = f"{labels.plural(len(health.metrics()), 'small line chart')} over training steps."
    return [Plot("health", "Health of training", reading, f"{alt} {reading}", health)]


def draw(health: Health, figure: Canvas, look: Look) -> None:
    """A small chart per metric; a line per configuration, its band from the smallest to the largest
    of its seeds.
    """
    shown = health.metrics()
    columns = min(2 if look.narrow else 3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure.set_size_inches(
        look.size[0], (1.45 if look.narrow else 1.75) * rows + 0.3 * len(health.names) + 0.5
    )
    styles = category_styles(list(health.names), look)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.remove()
            continue
        _panel(axes, health, shown[place], styles)
        axes.set_title(
            TITLES[shown[place]], fontsize="x-small" if look.narrow else "small", loc="left"
        )
        if place + columns >= len(shown):
            axes.set_xlabel("optimizer step", fontsize="small")
            axes.tick_params(labelbottom=True)
    wide = 44 if look.narrow else 120
    texts = {
        name: textwrap.fill(words, wide, break_on_hyphens=False)
        for name, words in health.names.items()
    }
    handles = [Line2D([], [], color=styles[name][0], label=text) for name, text in texts.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=1, fontsize="small")


def _panel(axes: Axes, health: Health, metric: str, styles: dict[int, tuple[str, str]]) -> None:
    lines = health.lines[health.lines["metric"] == metric]
    for place, name in enumerate(health.names):
        line = lines[lines["configuration"] == name].sort_values("step")
        colour, front = styles[name][0], 3 + len(health.names) - place
        axes.fill_between(
            line["step"], line["low"], line["high"], color=colour, alpha=0.18, linewidth=0
        )
        axes.plot(
            line["step"],
            line["mean"],
            color=colour,
            linewidth=2.0 if place == 0 else 1.1,
            zorder=front,
        )
    if metric.startswith(_GAP) and 0 < 10 * lines["low"].min() < lines["high"].max():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
    elif lines["low"].min() >= 0:
        axes.set_ylim(0, 1.07 * float(lines["high"].max()) or 1.0)
    if metric.startswith(_GAP):
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: labels.lr(value) if value else "0")
        )
    axes.tick_params(labelsize="x-small")


def _thinned(lines: pd.DataFrame) -> pd.DataFrame:
    """At most about `MAX_POINTS` steps a line: neighbouring ones as their mean, from their smallest
    to largest.
    """
    span = lines["step"].max() - lines["step"].min() + 1
    steps = lines.groupby(["configuration", "metric"])["step"].transform("size").max()
    width = math.ceil(span / MAX_POINTS) if steps > MAX_POINTS else 1
    groups = lines.groupby(
        ["configuration", "metric", (lines["step"] - lines["step"].min()) // width]
    )
    table = groups.agg(
        step=("step", "max"), mean=("mean", "mean"), low=("low", "min"), high=("high", "max")
    )
    return table.reset_index(["configuration", "metric"]).reset_index(drop=True)


def _leading(experiment: Experiment) -> dict[int, str]:
    """The leading configurations in words, best first, those with all seeds before others; of a
    run, the run.
    """
    if not experiment.is_sweep:
        return {-1: "the run"}
    names = {}
    for _, row in experiment.configurations.head(MAX_CONFIGURATIONS).iterrows():
        settings = labels.settings({key: row[key] for key in experiment.axes})
        name = f"configuration {row['configuration']}"
        names[int(row["configuration"])] = f"{name}: {settings}" if settings else name
    return names


def _reading(health: Health) -> str:
    """How the best configuration went, from the first tenth of its logged steps to the last; and
    what stands out.
    """
    first = next(iter(health.names))
    who = (
        "the run"
        if first == -1
        else f"configuration {first}{', the best,' if health.ranked else ''}"
    )
    parts = [text for metric in health.metrics() if (text := _course(health, first, metric))]
    said = (
        f"From the first to the last tenth of its steps {who} went: {labels.listed(parts)}."
        if parts
        else ""
    )
    off = _standing_out(health)
    return (
        f"{said} {f'To look at: {labels.listed(off)}.' if off else 'Nothing stands out.'}".strip()
    )


def _course(health: Health, name: int, metric: str) -> str | None:
    ends = _ends(health, name, metric)
    if ends is None or metric == f"{_GAP}/max":
        return None
    if metric.startswith(_GAP):
        return f"gap from sampler to trainer {ends[0]:.1g} to {ends[1]:.1g} nats a token"
    form = "{:.0%}" if metric == "frac_reward_zero_std" else "{:.3g}"
    return f"{TITLES[metric]} {form.format(ends[0])} to {form.format(ends[1])}"


def _ends(health: Health, name: int, metric: str) -> tuple[float, float] | None:
    """The means of the first and the last tenth of a configuration's logged steps; None where it
    logged none.
    """
    mine = health.lines[
        (health.lines["configuration"] == name) & (health.lines["metric"] == metric)
    ]
    if mine.empty:
        return None
    values = mine.sort_values("step")["mean"].to_numpy(float)
    count = max(1, len(values) // 10)
    return float(values[:count].mean()), float(values[-count:].mean())


def _standing_out(health: Health) -> list[str]:
    """What is no good sign in any of the configurations, each as a phrase."""
    left, wasted, apart = {}, {}, {}
    for name in health.names:
        entropy, groups = (
            _ends(health, name, "entropy"),
            _ends(health, name, "frac_reward_zero_std"),
        )
        mine = health.lines[
            (health.lines["configuration"] == name) & (health.lines["metric"] == f"{_GAP}/mean")
        ]
        if entropy and entropy[1] < COLLAPSED * entropy[0]:
            left[name] = entropy[1] / entropy[0]
        if groups and groups[1] > WASTED:
            wasted[name] = groups[1]
        if len(mine) and mine["high"].max() > LARGEST_GAP:
            apart[name] = float(mine["high"].max())
    found = []
    if left:
        found.append(
            f"entropy fell to as little as {min(left.values()):.0%} of its beginning{_of(left)}"
        )
    if wasted:
        found.append(
            f"up to {max(wasted.values()):.0%} of the groups gave no signal at the end{_of(wasted)}"
        )
    if apart:
        found.append(
            f"sampler and trainer were up to {max(apart.values()):.2g} nats a token "
            f"apart{_of(apart)}"
        )
    return found


def _of(names: Iterable[int]) -> str:
    known = [str(name) for name in names if name != -1]
    return (
        f" (configuration{'s' if len(known) > 1 else ''} {labels.listed(known)})" if known else ""
    )


FIGURE = Figure(order=55, data=data, draw=draw)
