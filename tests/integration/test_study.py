"""Rebuild the committed study's text, figures, numbers and page from its tables.

The bytes of a PNG depend on the versions of matplotlib, of FreeType within it, of Pillow and of
zlib within that. The comparisons therefore hold for the pinned lock (requirements/cpu.txt), on each
of its Pythons. A figure that differs under other versions is not wrong.
"""

from __future__ import annotations

import html
import re
from functools import partial
from pathlib import Path

import pytest

from analysis.data.tables import Tables
from analysis.experiment import Experiment
from analysis.figures import all_figures
from analysis.figures.drawing.render import render
from analysis.figures.drawing.theme import Look
from analysis.report import content, markup
from analysis.report.write import DOWNLOADS, FOLDER, REDRAW, lean, read, write
from harness.core.paths import PROJECT, RECIPES

STUDY = PROJECT / "docs" / "study"
WRITTEN_BY_HAND = {"README.md"}
NOT_TRACKED = {"index.html", "trials.csv"}


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tracked file below a folder by its name there."""
    files_by_name = {
        str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()
    }
    return {
        name: file.read_bytes() for name, file in files_by_name.items() if name not in NOT_TRACKED
    }


@pytest.fixture(scope="module")
def experiments() -> list[Experiment]:
    """Read the study's sweeps from its tables."""
    return read([STUDY / FOLDER])


@pytest.fixture(scope="module")
def redrawn(experiments: list[Experiment], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rebuild the whole study from its tables; return its folder."""
    return write(experiments, tmp_path_factory.mktemp("study"), processes=2).path.parent


def test_the_text_is_rebuilt_from_the_tables(experiments: list[Experiment]) -> None:
    values = content.comparison(experiments)
    text = markup.markdown("compare.md.j2", {**values, "redraw": REDRAW})
    assert text == (STUDY / "report.md").read_text()


def test_the_tables_are_those_of_a_report(experiments: list[Experiment], tmp_path: Path) -> None:
    tables = lean(experiments)
    tables.write(tmp_path)
    made, kept = files(tmp_path), files(STUDY / FOLDER)
    assert made.keys() == kept.keys()
    assert [name for name in made if made[name] != kept[name]] == []


def test_a_sweeps_figures_are_rebuilt_to_the_byte(experiments: list[Experiment]) -> None:
    drawn = {
        f"sweep-2-{plot.name}.png": render(partial(figure.draw, plot.data), Look()).png
        for figure in all_figures()
        for plot in figure.data(experiments[1])
    }
    kept = {file.name: file.read_bytes() for file in (STUDY / "figures").glob("sweep-2-*")}
    assert drawn.keys() == kept.keys()
    assert [name for name in drawn if drawn[name] != kept[name]] == []


@pytest.mark.slow
def test_the_study_is_rebuilt_to_the_byte(redrawn: Path) -> None:
    drawn, kept = files(redrawn), files(STUDY)
    assert drawn.keys() == kept.keys() - WRITTEN_BY_HAND
    assert [name for name in drawn if drawn[name] != kept[name]] == []


@pytest.mark.slow
def test_the_page_is_rebuilt_from_the_tables(redrawn: Path, experiments: list[Experiment]) -> None:
    page = html.unescape((redrawn / "index.html").read_text())
    for number, experiment in enumerate(experiments, 1):
        assert f'<a href="#sweep-{number}">{experiment.name}</a>' in page
        plots = [plot for figure in all_figures() for plot in figure.data(experiment)]
        assert page.count(f'<figure aria-labelledby="sweep-{number}-figure-') == len(plots) > 8
        assert [plot.name for plot in plots if f'alt="{plot.alt}"' not in page] == []
    assert page.count("python -m harness.run ") >= 426, "a command for every trial"
    loads = re.findall(r'\s(?:src|srcset|href|action|data)="([^"]*)"', page)
    beside = {path for path, _ in DOWNLOADS}
    assert [to for to in loads if not to.startswith(("data:", "#")) and to not in beside] == []


def test_the_study_has_every_recipe_with_full_fine_tuning_and_three_seeds() -> None:
    tables = Tables.read(STUDY / FOLDER)
    recipes = {file.stem for file in (RECIPES / "lora_without_regret").glob("*.yaml")}
    assert set(tables.sources["name"]) == recipes
    whole = tables.runs[tables.runs["score"].notna()]
    seeds = whole.groupby(["directory", "configuration"])["seed"].nunique()
    assert seeds.min() >= 3
    assert whole["full"].any()
