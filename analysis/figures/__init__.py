"""The report's figures: one module each, with a data and a draw function."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure as Canvas

from analysis.experiment import Experiment
from analysis.figures.drawing.render import Trace
from analysis.figures.drawing.theme import Look


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawing of a figure: its name and title, what it is and says in words, and its data."""

    name: str
    title: str
    what: str
    reading: str
    data: Any

    @property
    def alt(self) -> str:
        """The text for readers who do not see the drawing."""
        return f"{self.what} {self.reading}"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of the report.

    `data` returns the plots that an experiment has enough data for, often one or none. `draw` draws
    a plot's data and returns its tooltips, if any. `order` is its place on the page; `front`
    figures are shown unfolded. `dark_apart`: its dark drawing differs in more than colours.
    """

    order: int
    data: Callable[[Experiment], list[Plot]]
    draw: Callable[[Any, Canvas, Look], Sequence[Trace] | None]
    front: bool = False
    dark_apart: bool = False


def all_figures() -> list[Figure]:
    """Return every `FIGURE` that a module of this package defines, in the page's order."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return sorted((module.FIGURE for module in modules), key=lambda figure: figure.order)
