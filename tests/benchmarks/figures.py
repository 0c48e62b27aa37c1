"""Figures of the benchmarks' page, in Okabe and Ito's colours.

Each function draws one record and returns its file's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from tests.benchmarks.side_by_side import RESULTS

Record = dict[str, Any]
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
MARKERS = "os^Dv"


@contextmanager
def figure(name: str, columns: int, height: float = 3.2) -> Iterator[Any]:
    """Yield axes side by side, and write them to `figures/<name>.png` afterwards."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(
        1, columns, figsize=(4.6 * columns, height), squeeze=False, layout="constrained"
    )
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
    yield axes[0]
    (RESULTS / "figures").mkdir(exist_ok=True)
    drawing.savefig(RESULTS / "figures" / f"{name}.png", dpi=100)
    pyplot.close(drawing)


def single_run(record: Record) -> str:
    """Draw tokens a second at each batch size, and accuracy against seconds since launch."""
    with figure("single_run", 2) as (speed, accuracy):
        names = list(dict.fromkeys(name for rows in record["speed"].values() for name in rows))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            rates = [rows[name]["tokens_per_second"] for rows in record["speed"].values()]
            bars = speed.bar(
                [x + i * width for x in range(len(rates))],
                rates,
                width,
                color=COLOURS[i],
                label=name,
            )
            speed.bar_label(bars, fmt="%.0f", fontsize=8)
        centre = width * (len(names) - 1) / 2
        speed.set_xticks([x + centre for x in range(len(record["speed"]))], list(record["speed"]))
        speed.set(xlabel="completions a step", ylabel="completion tokens a second")
        speed.legend(
            frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(names)
        )
        for i, (name, contender) in enumerate(
            ((record.get("accuracy") or {}).get("contenders") or {}).items()
        ):
            points = list(zip(*contender["curves"], strict=True))
            x = [median(point["seconds"] for point in one) for one in points]
            y = [median(point["accuracy"] for point in one) for one in points]
            accuracy.plot(
                x, y, MARKERS[i] + "-", markersize=3, color=COLOURS[names.index(name)], label=name
            )
        accuracy.set(
            xlabel="seconds since launch, evaluation not counted",
            ylabel="held-out accuracy",
            ylim=(0, 1),
        )
    return "figures/single_run.png"


def sweep(record: Record) -> str:
    """Draw makespans and their parts."""
    with figure("sweep", len(record["sizes"]), height=3.6) as axes:
        for one, (size, rows) in zip(axes, record["sizes"].items(), strict=True):
            names = list(rows)[::-1]
            parts = list(dict.fromkeys(part for row in rows.values() for part in row["parts_s"]))
            left = [0.0] * len(names)
            for i, part in enumerate(parts):
                values = [rows[name]["parts_s"].get(part) or 0.0 for name in names]
                one.barh(names, values, left=left, color=COLOURS[i % len(COLOURS)], label=part)
                left = [a + b for a, b in zip(left, values, strict=True)]
            for name, end in zip(names, left, strict=True):
                one.text(end, name, f" {rows[name]['makespan_s']:.0f} s", va="center", fontsize=8)
            machines = ", ".join(dict.fromkeys(row["cpu"] for row in rows.values()))
            one.set(xlabel="seconds", xlim=(0, 1.15 * max(left)))
            one.set_title(f"{size} trials, {machines}", fontsize=9)
        axes[0].figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8
        )
    return "figures/sweep.png"


def pack(record: Record) -> str:
    """Draw the speedup against the number of members, and its bound."""
    with figure("pack", 2) as (speedup, share):
        for i, (engine, table) in enumerate(record["engines"].items()):
            members = [row["members"] for row in table["rows"]]
            measured, bound = ([row[key] for row in table["rows"]] for key in ("speedup", "bound"))
            speedup.plot(
                members, measured, MARKERS[i] + "-", color=COLOURS[i], label=f"{engine}, measured"
            )
            speedup.plot(members, bound, "--", color=COLOURS[i], label=f"{engine}, bound")
            for phase, style in (("rollout", ":"), ("update", "-")):
                shares = [row[f"{phase}_share_of_peak"] for row in table["rows"]]
                share.plot(
                    members,
                    shares,
                    MARKERS[i] + style,
                    color=COLOURS[i],
                    label=f"{engine}, {phase}",
                )
        for axes, label in (
            (speedup, "speedup over one trial after the other"),
            (share, "share of the matmul peak"),
        ):
            axes.set_xscale("log", base=2)
            axes.set_xticks(members, [str(n) for n in members])
            axes.set(xlabel="members in one pack", ylabel=label)
            axes.legend(frameon=False, fontsize=7)
    return "figures/pack.png"


def sync(record: Record) -> str:
    """Draw the latency of each sync mode against the rank."""
    with figure("sync", 1) as (axes,):
        rows = [row for row in record["rows"] if row["engine"] == "vllm"]
        for i, mode in enumerate(dict.fromkeys(row["sync"] for row in rows)):
            points = [(row["rank"], 1000 * row["seconds"]) for row in rows if row["sync"] == mode]
            axes.plot(*zip(*points, strict=True), MARKERS[i] + "-", color=COLOURS[i], label=mode)
        ranks = sorted({row["rank"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set(xlabel="rank", ylabel="milliseconds, vllm", yscale="log")
        axes.legend(frameon=False, fontsize=8)
    return "figures/sync.png"


FIGURES: dict[str, Callable[[Record], str]] = {
    "single_run": single_run,
    "sweep": sweep,
    "pack": pack,
    "sync": sync,
}
