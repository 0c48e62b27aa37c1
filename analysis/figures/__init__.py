"""Figures: one file each, with a data function and a draw function, found by `all_figures`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure as Canvas

from analysis.experiment import Experiment
from analysis.figures.drawing.theme import Look, Trace


@dataclass(frozen=True, slots=True)
class Plot:
    """What a figure's data function found: its place on the page, what it shows in words, and what
    to draw.
    """

    name: str
    title: str
    reading: str
    alt: str
    data: Any


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: `data` gives the plots an experiment has enough for (often one or none), `draw`
    draws one's data.

    `draw` returns what the page tells when a pointer is near, if anything. `front`: the page shows
    it unfolded. `dark_apart`: its drawing for a dark page differs by more than the theme's colours.
    """

    order: int
    data: Callable[[Experiment], list[Plot]]
    draw: Callable[[Any, Canvas, Look], Sequence[Trace] | None]
    front: bool = False
    dark_apart: bool = False


def all_figures() -> list[Figure]:
    """Every `FIGURE` that a module of this package defines, in the page's order."""
    modules = [
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
    ]
    return sorted(
        (m.FIGURE for m in modules if hasattr(m, "FIGURE")), key=lambda figure: figure.order
    )
