"""The committed study: its tables make its pages, figures and numbers again."""

from __future__ import annotations

from pathlib import Path

from analysis.load import Tables
from analysis.report import read, write
from harness.paths import PROJECT, RECIPES

STUDY = PROJECT / "docs" / "study"
WRITTEN_BY_HAND = {"README.md"}


def test_its_tables_redraw_the_study_to_the_byte(tmp_path: Path) -> None:
    write(read([STUDY / "tables"]), tmp_path, processes=2)
    drawn = {str(file.relative_to(tmp_path)): file for file in tmp_path.rglob("*") if file.is_file()}
    kept = {str(file.relative_to(STUDY)): file for file in STUDY.rglob("*") if file.is_file()}
    assert drawn.keys() == kept.keys() - WRITTEN_BY_HAND
    assert [name for name in drawn if drawn[name].read_bytes() != kept[name].read_bytes()] == []


def test_it_has_every_recipe_with_full_fine_tuning_and_three_seeds() -> None:
    tables = Tables.read(STUDY / "tables")
    recipes = {file.stem for file in (RECIPES / "lora_without_regret").glob("*.yaml")}
    assert set(tables.sources["name"]) == recipes
    whole = tables.runs[tables.runs["score"].notna()]
    seeds = whole.groupby(["directory", "configuration"])["seed"].nunique()
    assert seeds.min() >= 3
    assert whole["full"].any()
