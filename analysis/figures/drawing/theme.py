"""How every figure looks: light or dark, wide or narrow, colours that colour-blind readers can tell
apart.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Transform
from PIL import Image, ImageColor

from harness.records.run_dir import Status

# Okabe and Ito (2008), in the order that shows best on a light and on a dark page; no black, no
# yellow on white.
OKABE_ITO = {
    False: ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    True: ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"),
}
MARKERS = ("o", "s", "^", "D", "v", "P")
# Sharp at the width of a page; at 150 the same figures take a third more bytes.
DPI = 120
# Letters in a line of a legend's label on a narrow page, of which two stand side by side.
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
    """Which page a figure is drawn for."""

    dark: bool = False
    narrow: bool = False

    @property
    def colours(self) -> dict[str, str]:
        """The page's own colours: paper, ink, soft (second to ink), rule (grid), good (a band)."""
        return SCHEMES[self.dark]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        return (3.7, 3.7) if self.narrow else (9.6, 4.4)

    @property
    def sequence(self) -> Colormap:
        """Viridis without the end that fades into this page."""
        low, high = (0.22, 1.0) if self.dark else (0.0, 0.86)
        return ListedColormap(mpl.colormaps["viridis"](np.linspace(low, high, 256)))


@dataclass(frozen=True, slots=True)
class Trace:
    """A curve or point with tooltips: `about` names its subject, and `texts` has a line for each
    place.

    `x` and `y` are in the coordinates of `place`, for most an axes' `transData`. Neighbours are
    joined by a line.
    """

    about: str
    texts: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    place: Transform


@dataclass(frozen=True, slots=True)
class PlacedTrace:
    """A trace whose places are thousandths of the picture's width and height, from its top left
    corner.
    """

    about: str
    texts: list[str]
    places: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A figure as SVG and, if asked for, as PNG, with what it tells to a pointer."""

    svg: bytes
    png: bytes | None
    traces: list[PlacedTrace]


# Draws on a figure; returns what the page tells when a pointer is near, if anything.
Draw = Callable[[Figure, Look], Sequence[Trace] | None]


def status_style(status: str) -> tuple[Any, Any]:
    """Line style and end marker by status: pruned and running are hollow (dashed), failed is a
    cross (dotted).
    """
    if status == Status.COMPLETE.value:
        return "-", ""
    return (":", "x") if status == Status.FAILED.value else ("--", "o")


def category_styles(values: Sequence[Any], look: Look) -> dict[Any, tuple[str, str]]:
    """A colour and a marker for each category, in order; past six the colours come again with other
    markers.
    """
    colours, count = OKABE_ITO[look.dark], len(MARKERS)
    return {
        value: (colours[i % count], MARKERS[(i + i // count) % count])
        for i, value in enumerate(values)
    }


def rank_styles(ranks: Sequence[Any], look: Look) -> dict[Any, tuple[str, str]]:
    """A colour and a marker for each rank, in every figure the same; full fine-tuning (0) has the
    ink's and a star.

    More ranks than there are colours go along the sequence, from the lowest to the highest.
    """
    adapters = sorted(rank for rank in ranks if rank)
    styles = category_styles(adapters, look)
    if len(adapters) > len(MARKERS):
        shades = [
            to_hex(look.sequence(place / (len(adapters) - 1))) for place in range(len(adapters))
        ]
        styles = {
            rank: (shade, styles[rank][1]) for rank, shade in zip(adapters, shades, strict=True)
        }
    return {0: (look.colours["ink"], "*"), None: category_styles([0], look)[0], **styles}


def log_axis(
    axis: Axis, look: Look, span: tuple[float, float], words: Callable[[float], str]
) -> None:
    """Ticks of an axis on a log scale; `span` is the lowest and highest value: fewer decades get
    more ticks.
    """
    decades = math.log10(span[1] / span[0])
    wide = decades > (2.5 if look.narrow else 4.5)
    axis.set_major_locator(
        LogLocator(subs=(1.0,) if wide else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 5.0))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, handles: Sequence[Artist], look: Look) -> None:
    """A legend beside the axes, or on a narrow page below them; none without handles."""
    if handles and look.narrow:
        for handle in handles:
            label = textwrap.fill(
                str(handle.get_label()), NARROW_LABEL, max_lines=3, placeholder=" …"
            )
            handle.set_label(label)
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small")
    elif handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize="small")


def base_line(axes: Axes, base: float | None, text: str, look: Look) -> None:
    """The base model's level as a line with its name outside, at the right, where no data can cover
    it.
    """
    if base is None:
        return
    axes.axhline(base, color=look.colours["soft"], linestyle=(0, (1, 2)), linewidth=1.2, zorder=1)
    axes.annotate(
        text,
        (1.0, base),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=look.colours["soft"],
        fontsize="small",
    )


def render(draw: Draw, look: Look) -> bytes:
    """A figure as SVG; equal data gives equal bytes."""
    return render_all(draw, look, png=False).svg


def render_all(draw: Draw, look: Look, *, png: bool = True) -> Rendered:
    """A figure in every form, drawn and laid out once; equal data gives equal bytes."""
    with _settings(look):
        figure = Figure(figsize=look.size, dpi=DPI, layout="constrained")
        traces = draw(figure, look) or []
        svg = _svg(figure)  # lays it out, after which places are known
        placed = [_placed(figure, trace) for trace in traces]
        return Rendered(svg, _png(figure, look) if png else None, placed)


def darkened(svg: bytes) -> bytes:
    """The drawing for a dark page of a light one, whose colours are all of the theme: half the time
    of another one.
    """
    return _COLOUR.sub(lambda found: _DARK.get(found[0], found[0]), svg)


def _placed(figure: Figure, trace: Trace) -> PlacedTrace:
    points = trace.place.transform(np.column_stack([trace.x, trace.y]).astype(float))
    shares = figure.transFigure.inverted().transform(points)
    places = [
        (text, (round(1000 * x), round(1000 * (1 - y))))
        for text, (x, y) in zip(trace.texts, shares.tolist(), strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    return PlacedTrace(trace.about, [text for text, _ in places], [place for _, place in places])


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _png(figure: Figure, look: Look) -> bytes:
    """Return a laid-out figure as PNG with a palette: a quarter of the bytes of one without.

    The octree chooses the colours ten times as fast as Pillow's other methods, which makes this no
    slower than a PNG without a palette.
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
    """The dark page's colour for each of the light page's, as an SVG writes them."""
    pages = []
    for look in (Look(), Look(dark=True)):
        shades = [to_hex(look.sequence(place)) for place in range(look.sequence.N)]
        pages.append([*look.colours.values(), *OKABE_ITO[look.dark], *shades])
    return {
        light.lower().encode(): dark.lower().encode() for light, dark in zip(*pages, strict=True)
    }


_COLOUR = re.compile(rb"#[0-9a-f]{6}\b")
_DARK = _dark_by_light()


@contextmanager
def _settings(look: Look) -> Iterator[None]:
    colours = look.colours
    values: dict[Any, Any] = {
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
    with mpl.rc_context(values):
        yield
