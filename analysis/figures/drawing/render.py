"""Render a figure as SVG and PNG, with its tooltips; equal data gives equal bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Transform
from PIL import Image, ImageColor

from analysis.figures.drawing.theme import OKABE_ITO, Look

# Sharp at the width of a page; at 150 the same figures take a third more bytes.
DPI = 120


@dataclass(frozen=True, slots=True)
class Trace:
    """A curve or point with tooltips: its subject `about`, and a line of `texts` for each place.

    `x` and `y` are in the coordinates of `transform`, mostly an axes' `transData`. Neighbouring
    places are joined by a line.
    """

    about: str
    texts: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    transform: Transform


@dataclass(frozen=True, slots=True)
class PlacedTrace:
    """A trace in thousandths of the picture's width and height, from its top left corner."""

    about: str
    texts: list[str]
    places: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A figure as SVG and, if asked for, as PNG, with its tooltips."""

    svg: bytes
    png: bytes | None
    traces: list[PlacedTrace]


# Draws on a figure and returns its tooltips, if any.
Draw = Callable[[Figure, Look], Sequence[Trace] | None]


def render(draw: Draw, look: Look, *, png: bool = True) -> Rendered:
    """Draw and lay out a figure once, and render it in every form."""
    colours = look.colours
    settings: dict[Any, Any] = {
        "font.size": 9.5,
        "font.family": "DejaVu Sans",
        "svg.fonttype": "none",
        "svg.hashsalt": "noregret",
        "figure.facecolor": colours["paper"],
        "savefig.facecolor": colours["paper"],
        "axes.facecolor": colours["paper"],
        "axes.edgecolor": colours["rule"],
        "axes.labelcolor": colours["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": colours["rule"],
        "grid.linewidth": 0.6,
        "text.color": colours["ink"],
        "text.parse_math": False,  # a setting may hold any text, and half a formula is an error
        "xtick.color": colours["soft"],
        "ytick.color": colours["soft"],
        "legend.frameon": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=look.size, dpi=DPI, layout="constrained")
        traces = draw(figure, look) or []
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None}
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
        # The SVG has laid the figure out: from here on places are known.
        placed = [_place(figure, trace) for trace in traces]
        return Rendered(buffer.getvalue(), _png(figure, look) if png else None, placed)


def darkened(svg: bytes) -> bytes:
    """Return a light drawing for a dark page by replacing the theme's colours."""
    return _COLOUR.sub(lambda match: _DARK.get(match[0], match[0]), svg)


def _place(figure: Figure, trace: Trace) -> PlacedTrace:
    points = trace.transform.transform(np.column_stack([trace.x, trace.y]).astype(float))
    shares = figure.transFigure.inverted().transform(points)
    places = [
        (text, (round(1000 * x), round(1000 * (1 - y))))
        for text, (x, y) in zip(trace.texts, shares.tolist(), strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    return PlacedTrace(trace.about, [text for text, _ in places], [place for _, place in places])


def _png(figure: Figure, look: Look) -> bytes:
    """Return a laid-out figure as PNG with a palette, a quarter of the bytes of one without.

    The octree chooses the colours ten times as fast as Pillow's other methods.
    """
    figure.set_layout_engine("none")
    figure.set_dpi(DPI)  # an SVG's is 72
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    # The octree gives the paper the mean of all colours near it, (254, 254, 254) for white.
    palette = np.array(image.getpalette()).reshape(-1, 3)
    palette[np.asarray(image)[0, 0]] = ImageColor.getrgb(look.colours["paper"])
    image.putpalette(palette.ravel().tolist())
    image.save(buffer, "PNG", optimize=True, dpi=(DPI, DPI))
    return buffer.getvalue()


def _dark_by_light() -> dict[bytes, bytes]:
    """Return the dark page's colour for each of the light page's, as an SVG writes them."""
    pages = []
    for look in (Look(), Look(dark=True)):
        shades = [to_hex(look.sequence(place)) for place in range(look.sequence.N)]
        pages.append([*look.colours.values(), *OKABE_ITO[look.dark], *shades])
    return {
        light.lower().encode(): dark.lower().encode() for light, dark in zip(*pages, strict=True)
    }


_COLOUR = re.compile(rb"#[0-9a-f]{6}\b")
_DARK = _dark_by_light()
