"""Choose colours, styles, axes and legends for light and dark, wide and narrow pages."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.records.run_dir import Status

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008), for a light and a dark
# page: without black, and without yellow on white.
OKABE_ITO = {
    False: ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    True: ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"),
}
MARKERS = ("o", "s", "^", "D", "v", "P")
# Letters in a line of a legend's label on a narrow page, where two labels stand side by side.
NARROW_LABEL = 26
SCHEMES = {
    False: {
        "paper": "#ffffff",
        "ink": "#22272c",
        "soft": "#66707a",
        "rule": "#d9dde1",
        "good": "#e4f1e6",
    },
    True: {
        "paper": "#1c2126",
        "ink": "#e6e9ec",
        "soft": "#9aa4ae",
        "rule": "#3a424a",
        "good": "#23352a",
    },
}


@dataclass(frozen=True, slots=True)
class Look:
    """The page that a figure is drawn for."""

    dark: bool = False
    narrow: bool = False

    @property
    def colours(self) -> dict[str, str]:
        """The page's colours: paper, ink, soft (second to ink), rule (grid), good (a band)."""
        return SCHEMES[self.dark]

    @property
    def first(self) -> str:
        """The colour of a figure that has one."""
        return OKABE_ITO[self.dark][0]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        return (3.7, 3.7) if self.narrow else (9.6, 4.4)

    @property
    def sequence(self) -> Colormap:
        """Viridis without the end that fades into this page."""
        low, high = (0.22, 1.0) if self.dark else (0.0, 0.86)
        return ListedColormap(mpl.colormaps["viridis"](np.linspace(low, high, 256)))


def status_style(status: str) -> tuple[Any, Any]:
    """Return a line style and an end marker: solid when complete, dotted with a cross when failed.

    Other runs have a dashed line with a hollow end.
    """
    if status == Status.COMPLETE.value:
        return "-", ""
    return (":", "x") if status == Status.FAILED.value else ("--", "o")


def category_styles(values: Sequence[Any], look: Look) -> dict[Any, tuple[str, str]]:
    """Return a colour and a marker for each category; past six, colours repeat."""
    colours, count = OKABE_ITO[look.dark], len(MARKERS)
    return {
        value: (colours[i % count], MARKERS[(i + i // count) % count])
        for i, value in enumerate(values)
    }


def rank_styles(ranks: Sequence[Any], look: Look) -> dict[Any, tuple[str, str]]:
    """Return a colour and a marker for each rank, the same in every figure.

    Full fine-tuning (0) has the ink's colour and a star. More ranks than there are colours go along
    the sequence, from the lowest to the highest.
    """
    adapters = sorted(rank for rank in ranks if rank)
    styles = category_styles(adapters, look)
    if len(adapters) > len(MARKERS):
        shades = look.sequence(np.linspace(0, 1, len(adapters)))
        pairs = zip(adapters, shades, strict=True)
        styles = {rank: (to_hex(shade), styles[rank][1]) for rank, shade in pairs}
    return {0: (look.colours["ink"], "*"), None: category_styles([0], look)[0], **styles}


def log_axis(
    axis: Axis, look: Look, span: tuple[float, float], words: Callable[[float], str]
) -> None:
    """Set the ticks of an axis on a log scale from the lowest to the highest value of `span`.

    Fewer decades get more ticks.
    """
    decades = math.log10(span[1] / span[0])
    wide = decades > (2.5 if look.narrow else 4.5)
    subs = (1.0,) if wide else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, handles: Sequence[Artist], look: Look) -> None:
    """Draw a legend beside the axes, on a narrow page below them; none without handles."""
    if handles and look.narrow:
        for handle in handles:
            label = str(handle.get_label())
            handle.set_label(textwrap.fill(label, NARROW_LABEL, max_lines=3, placeholder=" …"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small")
    elif handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize="small")
