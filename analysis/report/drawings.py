"""A page's figures, drawn by several processes: as PNG files, and as SVG inside the page."""

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
from analysis.figures.drawing.theme import Look, PlacedTrace, darkened, render, render_all
from harness.records.run_dir import write_bytes

_SIZE = re.compile(rb'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"')
# CSS pixels in a point, an SVG's unit here.
_POINT = 96 / 72

Drawing = dict[str, Any]


def draw_all(
    experiments: dict[str, Experiment], folder: Path, processes: int
) -> dict[str, list[Drawing]]:
    """Every figure that each experiment has enough for, by the experiment's prefix, which also
    begins a file's name.
    """
    jobs = {
        prefix: [
            partial(_draw, figure, plot, folder, prefix)
            for figure in all_figures()
            for plot in figure.data(experiment)
        ]
        for prefix, experiment in experiments.items()
    }
    drawn = iter(_side_by_side([job for own in jobs.values() for job in own], processes))
    return {prefix: [next(drawn) for _ in own] for prefix, own in jobs.items()}


def _side_by_side(jobs: Sequence[Callable[[], Drawing]], processes: int) -> list[Drawing]:
    """The jobs' results in order; others begin at the first, and this process, which is up already,
    at the last.
    """
    others = min(processes, len(jobs)) - 1
    if others < 1:
        return [job() for job in jobs]
    # Not forked: a sweep's driver has threads.
    with ProcessPoolExecutor(others, get_context("spawn"), initializer=_serve) as pool:
        given = [pool.submit(job) for job in jobs]
        try:
            own = {
                place: jobs[place]()
                for place in reversed(range(len(jobs)))
                if given[place].cancel()
            }
            return [
                own[place] if place in own else future.result()
                for place, future in enumerate(given)
            ]
        finally:
            pool.shutdown(cancel_futures=True)


def _serve() -> None:
    """Make this process one that draws for another: Ctrl-C is the other's to answer, and it ends
    with the other.

    A pool's processes hold both ends of the queue they wait on, and so never hear that a killed one
    is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _draw(figure: Figure, plot: Plot, folder: Path, prefix: str) -> Drawing:
    """A plot as a PNG file, and with its four drawings (light or dark, wide or narrow) as data URIs
    and their sizes.

    `tells` is what it tells to a pointer (see `_tells`); empty where it tells nothing.
    """
    draw = partial(figure.draw, plot.data)
    wide, narrow = render_all(draw, Look()), render_all(draw, Look(narrow=True), png=False)
    assert wide.png is not None
    write_bytes(folder / f"{prefix}{plot.name}.png", wide.png)
    found: Drawing = {
        "id": f"{prefix}figure-{plot.name}",
        "name": f"{prefix}{plot.name}",
        "front": figure.front,
    }
    for width, light in (("wide", wide.svg), ("narrow", narrow.svg)):
        dark = render(draw, Look(True, width == "narrow")) if figure.dark_apart else darkened(light)
        found |= {
            f"light_{width}": _uri(light),
            f"dark_{width}": _uri(dark),
            f"{width}_size": _size(light),
        }
    words = {"title": plot.title, "reading": plot.reading, "alt": plot.alt}
    return {**found, **words, "tells": _tells(wide.traces, narrow.traces)}


def _tells(wide: Sequence[PlacedTrace], narrow: Sequence[PlacedTrace]) -> str:
    """A figure's traces as JSON: `texts`, each once, and `traces` of places in them and on the
    pictures.

    A trace is a flat list: its subject's text, and for each place its text, then x and y on the
    wide and on the narrow picture.
    """
    known: dict[str, int] = {}

    def number(text: str) -> int:
        return known.setdefault(text, len(known))

    traces = []
    for one, other in zip(wide, narrow, strict=True):
        row = [number(one.about)]
        for text, at, narrow_at in zip(one.texts, one.places, other.places, strict=True):
            row += [number(text), *at, *narrow_at]
        if len(row) > 1:
            traces.append(row)
    return (
        json.dumps({"texts": list(known), "traces": traces}, separators=(",", ":"))
        if traces
        else ""
    )


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _size(svg: bytes) -> tuple[int, int]:
    found = _SIZE.search(svg)
    assert found is not None
    return round(float(found[1]) * _POINT), round(float(found[2]) * _POINT)
