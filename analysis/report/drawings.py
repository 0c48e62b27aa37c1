"""Draw a page's figures in several processes: as PNG files, and as SVG inside the page."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from analysis.experiment import Experiment
from analysis.figures import Figure, Plot, all_figures
from analysis.figures.drawing.render import PlacedTrace, darkened, render
from analysis.figures.drawing.theme import Look
from harness.records.files import write_bytes

_SIZE = re.compile(rb'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"')
# CSS pixels in a point, the unit of the SVGs.
_POINT = 96 / 72

Drawing = dict[str, Any]


def draw_all(
    experiments: dict[str, Experiment], folder: Path, processes: int
) -> dict[str, list[Drawing]]:
    """Draw every figure of each experiment; its prefix begins the files' names."""
    jobs = {
        prefix: [
            partial(_draw, figure, plot, folder, prefix)
            for figure in all_figures()
            for plot in figure.data(experiment)
        ]
        for prefix, experiment in experiments.items()
    }
    drawn = iter(_side_by_side([job for part in jobs.values() for job in part], processes))
    return {prefix: [next(drawn) for _ in part] for prefix, part in jobs.items()}


def _side_by_side(jobs: Sequence[Callable[[], Drawing]], processes: int) -> list[Drawing]:
    """Return the jobs' results in order.

    Other processes begin at the first job; this one, which is running already, at the last.
    """
    others = min(processes, len(jobs)) - 1
    if others < 1:
        return [job() for job in jobs]
    # Not forked, because a sweep's driver has threads.
    with ProcessPoolExecutor(others, get_context("spawn"), initializer=_start_process) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            mine = {p: jobs[p]() for p in reversed(range(len(jobs))) if futures[p].cancel()}
            return [
                mine[place] if place in mine else future.result()
                for place, future in enumerate(futures)
            ]
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """Leave Ctrl-C to the parent process, and end with it.

    A pool's processes hold both ends of the queue they wait on, so they do not notice that a killed
    parent is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _draw(figure: Figure, plot: Plot, folder: Path, prefix: str) -> Drawing:
    """Write a plot's PNG; return its four SVGs (light or dark, wide or narrow) and its texts."""
    draw, name = partial(figure.draw, plot.data), f"{prefix}{plot.name}"
    wide, narrow = render(draw, Look()), render(draw, Look(narrow=True), png=False)
    assert wide.png is not None
    write_bytes(folder / f"{name}.png", wide.png)
    drawing: Drawing = {
        "id": f"{prefix}figure-{plot.name}",
        "name": name,
        "front": figure.front,
        "title": plot.title,
        "reading": plot.reading,
        "alt": plot.alt,
        "tooltips": _tooltips(wide.traces, narrow.traces),
    }
    for width, light in (("wide", wide.svg), ("narrow", narrow.svg)):
        dark = darkened(light)
        if figure.dark_apart:
            dark = render(draw, Look(True, width == "narrow"), png=False).svg
        for shade, svg in (("light", light), ("dark", dark)):
            encoded = base64.b64encode(svg).decode()
            drawing[f"{shade}_{width}"] = f"data:image/svg+xml;base64,{encoded}"
        size = _SIZE.search(light)
        assert size is not None
        drawing[f"{width}_size"] = tuple(round(float(part) * _POINT) for part in size.groups())
    return drawing


def _tooltips(wide: Sequence[PlacedTrace], narrow: Sequence[PlacedTrace]) -> str:
    """Return a figure's traces as JSON: `texts`, each once, and `traces` that refer to them.

    A trace is a flat list: its subject's text, and for each place its text, then x and y on the
    wide and on the narrow picture. Empty without traces.
    """
    known: dict[str, int] = {}
    traces = []
    for one, other in zip(wide, narrow, strict=True):
        row = [known.setdefault(one.about, len(known))]
        for text, at, narrow_at in zip(one.texts, one.places, other.places, strict=True):
            row += [known.setdefault(text, len(known)), *at, *narrow_at]
        if len(row) > 1:
            traces.append(row)
    if not traces:
        return ""
    return json.dumps({"texts": list(known), "traces": traces}, separators=(",", ":"))
