"""The page of metrics, made from their definitions."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness.config import metrics
from harness.config.recipe_keys import known_keys
from harness.core.paths import PROJECT


def cells(line: str) -> list[str]:
    """A Markdown table's row; an escaped bar is text."""
    return [
        cell.replace("\0", "|").strip()
        for cell in line.replace("\\|", "\0").strip().strip("|").split("|")
    ]


def page_rows() -> dict[str, list[str]]:
    lines = [
        line
        for line in (PROJECT / "docs" / "reference" / "metrics.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    return {row[0].strip("`"): row for row in map(cells, lines)}


def test_the_page_is_what_the_code_prints() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "harness.config.metrics"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (PROJECT / "docs" / "reference" / "metrics.md").read_text() == printed.stdout, (
        "make it again: python -m harness.config.metrics > docs/reference/metrics.md"
    )


def test_every_metric_has_one_full_row() -> None:
    rows = page_rows()
    assert set(rows) == {*metrics.METRICS, "eval/mean@N", "eval/pass@N"}
    assert all(len(row) == 6 and row[1] and row[4] for row in rows.values())


@pytest.mark.parametrize(
    "name", ["kl", "critic/explained_variance", "step_time", "eval/pass@8", "lora/norm_A"]
)
def test_a_row_says_what_the_definition_says(name: str) -> None:
    metric = metrics.lookup(name)
    assert page_rows()[metric.name][1:] == [
        metric.meaning,
        metric.unit,
        metric.direction or "",
        metric.logged,
        "yes" if metric.timing else "",
    ]


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("critic/explained_variance", "maximize"),
        ("timing_s/critic", "minimize"),
        ("eval/mean@4", "maximize"),
    ],
)
def test_directions(name: str, direction: str) -> None:
    assert metrics.direction(name) == direction


def test_conditional_metrics_name_keys_of_the_recipe() -> None:
    named = {part.split("=")[0] for row in page_rows().values() for part in row[4].split("`")[1::2]}
    assert named
    assert not {name for name in named if not any(key.endswith(f".{name}") for key in known_keys())}


def test_importing_the_definitions_loads_no_deep_learning_stack() -> None:
    code = (
        "import sys, harness.config.metrics; print({'torch', 'pandas', 'wandb', 'ray'} "
        "& set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
