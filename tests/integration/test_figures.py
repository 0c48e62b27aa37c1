"""Test the contract of every registered figure.

Tests of single figures are in figures/.
"""

from __future__ import annotations

import io
import pkgutil
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image, ImageColor

from analysis import figures
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot, all_figures, learning_curves
from analysis.figures.drawing.render import Draw, darkened, render
from analysis.figures.drawing.theme import OKABE_ITO, Look, category_styles, rank_styles
from harness.records.run_dir import Status
from tests.unit.analysis import worlds
from tests.unit.analysis.simulation import Arm, World, batched, placed
from tests.unit.analysis.synthetic import Sweep, Trial, params, write_sweep

MODULES = {found.name for found in pkgutil.iter_modules(figures.__path__) if not found.ispkg}
COLOUR = re.compile(r"#[0-9a-f]{6}\b")
LOOKS = [Look(dark, narrow) for dark in (False, True) for narrow in (False, True)]
RATES: dict[str, Any] = {"seeds": 2, "rates": 5, "failures": 0.0}
# Together these have enough data for every figure.
WORLDS: list[Callable[[], World]] = [
    lambda: World((Arm(0, best=-4.0), Arm(1), Arm(8), Arm(64)), **RATES),
    lambda: placed(0.9, **RATES),
    lambda: batched({0: 0.0, 1: 0.13, 16: 0.13}, **RATES),
]


def named(figure: Figure) -> str:
    """Return the name of a figure's module."""
    return figure.data.__module__.rsplit(".", 1)[-1]


@pytest.fixture(scope="module")
def plots(experiment: Experiment) -> Callable[[Figure], list[Plot]]:
    """Return a function that gives a figure's first plots of an example or simulated sweep."""
    known: dict[str, list[Plot]] = {}
    experiments: list[Experiment] = [experiment]

    def first(figure: Figure) -> list[Plot]:
        if named(figure) not in known:
            if len(experiments) == 1:
                experiments.extend(worlds.experiment(make()) for make in WORLDS)
            datasets = (figure.data(one) for one in experiments)
            known[named(figure)] = next((some for some in datasets if some), [])
        return known[named(figure)]

    return first


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> list[Experiment]:
    """Return sweeps with little to show: no trial, one waiting trial, and no complete trial."""
    root = tmp_path_factory.mktemp("unfinished")
    trials = [
        Trial(0, 0, params(8, 1e-3), 0.4, Status.FAILED, "out of memory", last_step=10),
        Trial(1, 0, params(1, 1e-2), 0.2, Status.PRUNED, "below the median", last_step=10),
        Trial(2, 0, params(1, 1e-4), 0.2, Status.CREATED),
    ]
    parts: dict[str, list[Trial]] = {
        "none": [],
        "waiting": trials[2:],
        "one": [Trial(0, 0, params(8, 1e-3), 0.9)],
        "incomplete": trials,
    }
    sweeps = {name: Sweep(some, seeds=[0], status=Status.RUNNING) for name, some in parts.items()}
    return [Experiment.open(write_sweep(root / name, sweep)) for name, sweep in sweeps.items()]


def test_every_module_registers_its_figure() -> None:
    assert {named(figure) for figure in all_figures()} == MODULES
    orders = [figure.order for figure in all_figures()]
    assert orders == sorted(set(orders))


@pytest.mark.parametrize("figure", all_figures(), ids=named)
class TestContract:
    def test_the_caption_describes_the_figure(
        self, figure: Figure, plots: Callable[[Figure], list[Plot]]
    ) -> None:
        assert plots(figure)
        for plot in plots(figure):
            assert plot.name.isidentifier()
            assert plot.reading.endswith(".")
            assert plot.reading in plot.alt

    @pytest.mark.parametrize("narrow", [False, True])
    def test_a_figure_is_drawn_for_every_page(
        self, figure: Figure, narrow: bool, plots: Callable[[Figure], list[Plot]]
    ) -> None:
        for plot in plots(figure):
            drawn = {
                look: render(partial(figure.draw, plot.data), look, png=False).svg
                for look in LOOKS
                if look.narrow == narrow
            }
            for look, svg in drawn.items():
                root = ET.fromstring(svg)
                assert root.tag.endswith("svg")
                assert look.colours["paper"] in svg.decode()
                width = float(root.attrib["width"].removesuffix("pt"))
                assert width == pytest.approx(look.size[0] * 72, rel=0.01)
            light, dark = drawn.values()
            if not figure.dark_apart:
                assert_same_drawing(darkened(light), dark)

    def test_equal_data_gives_equal_bytes(
        self, figure: Figure, plots: Callable[[Figure], list[Plot]]
    ) -> None:
        draw = partial(figure.draw, plots(figure)[0].data)
        every = render(draw, Look())
        assert render(draw, Look()) == every
        assert render(draw, Look(), png=False).svg == every.svg

    def test_tooltips_are_within_the_picture(
        self, figure: Figure, plots: Callable[[Figure], list[Plot]]
    ) -> None:
        draw = partial(figure.draw, plots(figure)[0].data)
        wide, narrow = (
            render(draw, Look(narrow=narrow), png=False).traces for narrow in (False, True)
        )
        assert bool(wide) == figure.front
        tooltips = [[(trace.about, trace.texts) for trace in traces] for traces in (wide, narrow)]
        assert tooltips[0] == tooltips[1], "the page has one list of texts for both"
        for trace in (*wide, *narrow):
            assert len(trace.texts) == len(trace.places)
            assert all(0 < x < 1000 and 0 < y < 1000 for x, y in trace.places)

    def test_nothing_to_show_is_no_plot(self, figure: Figure, unfinished: list[Experiment]) -> None:
        assert figure.data(unfinished[0]) == []

    def test_a_sweep_that_has_hardly_begun_is_no_error(
        self, figure: Figure, unfinished: list[Experiment]
    ) -> None:
        for experiment in unfinished[1:]:
            for plot in figure.data(experiment):
                assert plot.reading.endswith(".")
                assert render(partial(figure.draw, plot.data), Look(), png=False).svg


def assert_same_drawing(first: bytes, second: bytes) -> None:
    """Assert that two SVG drawings differ only in ids and in colours that look the same."""
    one, other = with_numbered_ids(first), with_numbered_ids(second)
    assert re.sub(COLOUR, "#", one) == re.sub(COLOUR, "#", other)
    pairs = zip(re.findall(COLOUR, one), re.findall(COLOUR, other), strict=True)
    channels = [(int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for a, b in pairs for i in (1, 3, 5)]
    assert max((abs(a - b) for a, b in channels), default=0) <= 4


def with_numbered_ids(svg: bytes) -> str:
    """Return an SVG drawing with its marks and hatches numbered in order.

    matplotlib names them by a hash of their look.
    """
    names: dict[str, str] = {}
    return re.sub(
        r"[hm][0-9a-f]{10}",
        lambda match: names.setdefault(match[0], f"mark{len(names)}"),
        svg.decode(),
    )


def test_a_png_is_an_image_of_the_look(experiment: Experiment) -> None:
    plot = learning_curves.data(experiment)[0]
    image = png(partial(learning_curves.draw, plot.data), Look(dark=True))
    assert (image.mode, image.width) == ("P", 1152)
    assert image.convert("RGB").getpixel((2, 2)) == (0x1C, 0x21, 0x26), "the paper's own colour"


def test_a_palette_keeps_categories_and_shades() -> None:
    """Check that colours of categories and of a colour bar stay nearly the same in the PNG."""
    look = Look()
    categories = [ImageColor.getrgb(colour) for colour in OKABE_ITO[False]]
    shades = np.round(255 * look.sequence(np.arange(256))[:, :3]).astype(int).tolist()

    def draw(canvas: Canvas, look: Look) -> None:
        for axes, colours in zip(canvas.subplots(2), (categories, shades), strict=True):
            axes.imshow(np.array([colours], dtype=np.uint8), aspect="auto")

    shown = np.asarray(png(draw, look).convert("RGB")).astype(int)
    found = np.unique(shown.reshape(-1, 3), axis=0)
    off = [int(np.abs(found - colour).max(axis=1).min()) for colour in (*categories, *shades)]
    assert max(off[: len(categories)]) <= 2
    assert max(off) <= 8


def png(draw: Draw, look: Look) -> Image.Image:
    """The PNG that is drawn, opened."""
    drawn = render(draw, look).png
    assert drawn is not None
    return Image.open(io.BytesIO(drawn))


def test_no_two_categories_look_the_same() -> None:
    for look in LOOKS:
        styles = category_styles(range(20), look)
        assert len(set(styles.values())) == 20
        ranks = rank_styles([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512], look)
        assert len({ranks[rank] for rank in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)}) == 11
        assert ranks[0] == (look.colours["ink"], "*")
