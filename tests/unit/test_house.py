"""What `python -m tests.house` counts, on sources made for the purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import house


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of two areas without a fault."""
    write(tmp_path, "harness/core/errors.py", "class UserError(Exception): ...\n")
    write(tmp_path, "rltrain/step.py", "from harness.core.errors import UserError\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for folder in path.relative_to(root).parents[:-1]:
        (root / folder / "__init__.py").touch()


def faults(root: Path) -> list[str]:
    return house.measure(root)[1]


def test_a_sound_project_has_no_fault(project: Path) -> None:
    assert faults(project) == []


@pytest.mark.parametrize(
    "imports",
    [
        "from rltrain import step\n",
        "import rltrain.step\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rltrain.step import x\n",
        "def work():\n    from rltrain.step import x\n" + "    pass\n" * 60,
    ],
)
def test_a_circle_counts_wherever_the_import_stands(project: Path, imports: str) -> None:
    write(project, "harness/core/errors.py", imports)
    assert faults(project) == [
        "modules import each other: harness.core.errors, rltrain.step",
        "packages import each other: harness.core and rltrain",
    ]


def test_packages_can_import_each_other_without_a_circle_of_modules(project: Path) -> None:
    write(project, "rltrain/report.py", "")
    write(project, "harness/core/cli.py", "from rltrain.report import x\n")
    assert faults(project) == ["packages import each other: harness.core and rltrain"]


def test_repeated_classes_large_folders_and_long_modules(project: Path) -> None:
    write(project, "rltrain/errors.py", "class UserError(Exception): ...\n")
    for number in range(house.MOST_MODULES):
        write(project, f"rltrain/envs/env{number}.py", "\n" * 30)
    assert faults(project) == ["class UserError is defined in harness.core.errors, rltrain.errors"]
    write(project, "rltrain/envs/more.py", "")
    assert "rltrain.envs has 13 modules, more than 12" in faults(project)
    write(project, "rltrain/long.py", "\n" * (house.MOST_LINES + 1))
    assert f"rltrain.long has {house.MOST_LINES + 1} lines, more than 400" in faults(project)


def test_a_private_function_without_a_caller(project: Path) -> None:
    write(
        project,
        "rltrain/card.py",
        "def card():\n    return _used()\n\n\ndef _used(): ...\n" + "\n" * 60,
    )
    assert faults(project) == []
    write(project, "rltrain/card.py", "def card(): ...\n\n\ndef _used(): ...\n" + "\n" * 60)
    assert faults(project) == ["nothing calls rltrain.card._used"]


def test_levels_are_the_longest_chain_of_imports(project: Path) -> None:
    write(project, "rltrain/trainer.py", "from rltrain.step import x\n")
    write(project, "rltrain/run.py", "from rltrain import step, trainer\n")
    graph = house.import_graph(house.read_modules(project))
    assert house.levels(graph, "rltrain") == 3
    assert house.levels(graph, "harness") == 1
