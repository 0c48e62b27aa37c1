"""Show the health of training over steps: small charts of the leading configurations."""

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
# Above this mean gap of log-probabilities the engine no longer samples the trained policy.
LARGEST_GAP = 0.02
# An entropy below this share of its first value has collapsed; a batch is wasted when more groups
# than this give no signal.
COLLAPSED, WASTED = 0.1, 0.5


@dataclass(frozen=True, slots=True)
class HealthData:
    """`lines`: configuration, metric, step, mean over seeds with the least (low) and most (high).

    `names` has the configurations in words, the best first; -1 is a single run. `ranked`: the first
    has all its seeds.
    """

    lines: pd.DataFrame
    names: dict[int, str]
    ranked: bool

    def metrics(self) -> list[str]:
        """Return the logged metrics in the order of their panels."""
        logged = set(self.lines["metric"])
        return [name for name in TITLES if name in logged]

    def line(self, name: int, metric: str) -> pd.DataFrame:
        """Return one configuration's line of a metric, in the order of its steps."""
        of_name = self.lines["configuration"] == name
        return self.lines[of_name & (self.lines["metric"] == metric)].sort_values("step")


def data(experiment: Experiment) -> list[Plot]:
    """Return what the leading configurations logged of `TITLES` at two steps or more."""
    steps, leading = experiment.tables.steps, {-1: "the run"}
    if experiment.is_sweep:
        leading = {}
        for _, row in experiment.configurations.head(MAX_CONFIGURATIONS).iterrows():
            settings = labels.settings({key: row[key] for key in experiment.axes})
            name = f"configuration {row['configuration']}"
            leading[int(row["configuration"])] = f"{name}: {settings}" if settings else name
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
    health = HealthData(lines, shown, best is not None and best.configuration in shown)
    what = f"{labels.plural(len(health.metrics()), 'small line chart')} over training steps."
    return [Plot("health", "Health of training", what, _reading(health), health)]


def _thinned(lines: pd.DataFrame) -> pd.DataFrame:
    """Join neighbouring steps, so that a line has about `MAX_POINTS` of them."""
    first, last = lines["step"].min(), lines["step"].max()
    steps = lines.groupby(["configuration", "metric"])["step"].transform("size").max()
    width = math.ceil((last - first + 1) / MAX_POINTS) if steps > MAX_POINTS else 1
    groups = lines.groupby(["configuration", "metric", (lines["step"] - first) // width])
    table = groups.agg(
        step=("step", "max"), mean=("mean", "mean"), low=("low", "min"), high=("high", "max")
    )
    return table.reset_index(["configuration", "metric"]).reset_index(drop=True)


def _reading(health: HealthData) -> str:
    """Say how the best configuration went, and which signs in any of them are bad."""
    first = next(iter(health.names))
    who = "the run"
    if first != -1:
        who = f"configuration {first}{', the best,' if health.ranked else ''}"
    parts = []
    for metric in health.metrics():
        ends = _ends(health, first, metric)
        if ends is None or metric == f"{_GAP}/max":
            continue
        if metric.startswith(_GAP):
            text = f"gap from sampler to trainer {ends[0]:.1g} to {ends[1]:.1g} nats a token"
        else:
            form = ".0%" if metric == "frac_reward_zero_std" else ".3g"
            text = f"{TITLES[metric]} {ends[0]:{form}} to {ends[1]:{form}}"
        parts.append(text)
    course = ""
    if parts:
        course = (
            f"From the first to the last tenth of its steps {who} went: {labels.listed(parts)}."
        )
    signs = _bad_signs(health)
    judged = f"To look at: {labels.listed(signs)}." if signs else "Nothing stands out."
    return f"{course} {judged}".strip()


def _ends(health: HealthData, name: int, metric: str) -> tuple[float, float] | None:
    """Return the means of the first and the last tenth of a configuration's logged steps."""
    values = health.line(name, metric)["mean"].to_numpy(float)
    count = max(1, len(values) // 10)
    return (float(values[:count].mean()), float(values[-count:].mean())) if len(values) else None


def _bad_signs(health: HealthData) -> list[str]:
    """Return the bad signs in any of the configurations, each as a phrase."""
    left, wasted, apart = {}, {}, {}
    for name in health.names:
        entropy = _ends(health, name, "entropy")
        groups = _ends(health, name, "frac_reward_zero_std")
        gap = health.line(name, f"{_GAP}/mean")["high"].max()
        if entropy and entropy[1] < COLLAPSED * entropy[0]:
            left[name] = entropy[1] / entropy[0]
        if groups and groups[1] > WASTED:
            wasted[name] = groups[1]
        if gap > LARGEST_GAP:
            apart[name] = float(gap)
    signs = []
    if left:
        least = f"{min(left.values()):.0%}"
        signs.append(f"entropy fell to as little as {least} of its first value{_of(left)}")
    if wasted:
        most = f"{max(wasted.values()):.0%}"
        signs.append(f"up to {most} of the groups gave no signal at the end{_of(wasted)}")
    if apart:
        most = f"{max(apart.values()):.2g} nats a token"
        signs.append(f"sampler and trainer were up to {most} apart{_of(apart)}")
    return signs


def _of(names: Iterable[int]) -> str:
    known = [str(name) for name in names if name != -1]
    plural = "s" if len(known) > 1 else ""
    return f" (configuration{plural} {labels.listed(known)})" if known else ""


def draw(health: HealthData, figure: Canvas, look: Look) -> None:
    """Draw a small chart for each metric, with a line and a band for each configuration."""
    shown = health.metrics()
    columns = min(2 if look.narrow else 3, len(shown))
    rows = math.ceil(len(shown) / columns)
    height = (1.45 if look.narrow else 1.75) * rows + 0.3 * len(health.names) + 0.5
    figure.set_size_inches(look.size[0], height)
    styles = category_styles(list(health.names), look)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.remove()
            continue
        _panel(axes, health, shown[place], styles)
        size = "x-small" if look.narrow else "small"
        axes.set_title(TITLES[shown[place]], fontsize=size, loc="left")
        if place + columns >= len(shown):
            axes.set_xlabel("optimizer step", fontsize="small")
            axes.tick_params(labelbottom=True)
    handles = []
    for name, words in health.names.items():
        label = textwrap.fill(words, 44 if look.narrow else 120, break_on_hyphens=False)
        handles.append(Line2D([], [], color=styles[name][0], label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=1, fontsize="small")


def _panel(axes: Axes, health: HealthData, metric: str, styles: dict[int, tuple[str, str]]) -> None:
    for place, name in enumerate(health.names):
        line, colour = health.line(name, metric), styles[name][0]
        band = line["step"], line["low"], line["high"]
        axes.fill_between(*band, color=colour, alpha=0.18, linewidth=0)
        width, front = 2.0 if place == 0 else 1.1, 3 + len(health.names) - place
        axes.plot(line["step"], line["mean"], color=colour, linewidth=width, zorder=front)
    lines = health.lines[health.lines["metric"] == metric]
    low, high = float(lines["low"].min()), float(lines["high"].max())
    if metric.startswith(_GAP) and 0 < 10 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_minor_locator(NullLocator())
    elif low >= 0:
        axes.set_ylim(0, 1.07 * high or 1.0)
    if metric.startswith(_GAP):
        words = FuncFormatter(lambda value, _: labels.lr(value) if value else "0")
        axes.yaxis.set_major_formatter(words)
    axes.tick_params(labelsize="x-small")


FIGURE = Figure(order=55, data=data, draw=draw)
