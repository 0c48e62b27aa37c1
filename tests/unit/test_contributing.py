"""What contributors are told exists: make targets, files, hooks; CI calls what there is.

GitHub's expressions (`${{ ... }}`) cannot be evaluated here: they are only seen to be in their
places.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.core.paths import PROJECT

WORKFLOW = PROJECT / ".github" / "workflows" / "ci.yml"
HOOKS = PROJECT / ".pre-commit-config.yaml"
CHECK_SUBJECT = PROJECT / ".ci" / "check-subject"
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/guides/install.md"]


def targets() -> set[str]:
    return set(re.findall(r"(?m)^([a-z][a-z0-9-]*):", (PROJECT / "Makefile").read_text()))


def called(commands: list[str]) -> set[str]:
    """The targets of those commands that call make; variables and comments are left out."""
    calls = [line.partition("#")[0].split()[1:] for line in commands if line.startswith("make ")]
    return {word for words in calls for word in words if "=" not in word}


def jobs() -> dict[str, dict[str, Any]]:
    # As text: YAML 1.1 reads the key `on` as true.
    loaded: dict[str, Any] = yaml.load(WORKFLOW.read_text(), Loader=yaml.BaseLoader)
    assert {"pull_request", "push", "schedule"} <= set(loaded["on"])
    assert loaded["concurrency"]["group"]
    return dict(loaded["jobs"])


def commands(job: dict[str, Any]) -> list[str]:
    return [line for step in job["steps"] for line in step.get("run", "").splitlines()]


def test_a_job_of_ci_calls_targets_that_exist_and_ends_in_time() -> None:
    for job in jobs().values():
        assert called(commands(job)) <= targets()
        assert 0 < int(job["timeout-minutes"]) <= 180


def test_ci_runs_each_tier_when_it_should() -> None:
    by_event = {
        event: {
            name for job in jobs().values() if event in job["if"] for name in called(commands(job))
        }
        for event in ("pull_request", "push", "schedule")
    }
    assert {"lint", "test-fast"} <= by_event["pull_request"]
    assert {"lint", "test"} <= by_event["push"]
    assert "test-all" in by_event["schedule"]


def test_ci_runs_the_fast_tests_on_every_python_that_the_package_names() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert jobs()["fast"]["strategy"]["matrix"]["python"] == named


def test_ci_uses_githubs_own_actions_and_no_address() -> None:
    used = {
        step["uses"].split("@")[0]
        for job in jobs().values()
        for step in job["steps"]
        if "uses" in step
    }
    assert {"actions/checkout", "actions/setup-python"} <= used
    assert all(name.startswith("actions/") for name in used)
    assert "://" not in WORKFLOW.read_text()


def test_every_hook_is_local_and_runs_what_is_there() -> None:
    loaded = yaml.safe_load(HOOKS.read_text())
    assert [repo["repo"] for repo in loaded["repos"]] == ["local"]
    for hook in loaded["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        program = Path(hook["entry"].split()[0])
        if program.parts[0] == ".venv":
            # That of the environment whose Python runs the tests, wherever it is.
            assert (Path(sys.executable).parent / program.name).exists(), program
        elif program.parent.parts:
            assert os.access(PROJECT / program, os.X_OK), program


@pytest.mark.parametrize(
    ("message", "taken"),
    [
        ("x" * 72, True),
        ("x" * 73, False),
        ("é" * 72, True),
        (f"Add a loss\n\n{'x' * 200}\n", True),
        (
            f"# a comment of git's that is longer than a subject may be{'x' * 72}\n\nAdd a loss\n",
            True,
        ),
        (f"\n{'x' * 73}\n", False),
        ("", True),  # git refuses it by itself
    ],
)
def test_a_subject_has_at_most_72_characters(message: str, taken: bool, tmp_path: Path) -> None:
    file = tmp_path / "COMMIT_EDITMSG"
    file.write_text(message)
    done = subprocess.run([CHECK_SUBJECT, file], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if taken else 2)
    assert ("at most 72" in done.stderr) is not taken


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_a_page_names_exist(page: str) -> None:
    text = (PROJECT / page).read_text()
    assert called(re.findall(r"`([^`\n]+)`", text) + text.splitlines()) <= targets()


def test_files_that_the_guide_names_exist_and_it_is_short() -> None:
    text = (PROJECT / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) < 150
    paths = re.findall(r"`([\w.-]+/[\w./*-]+)`|\]\(([\w./-]+)\)", text)
    named = {one or other for one, other in paths}
    there = {name for name in named if "NAME" not in name and not name.startswith(".venv")}
    assert len(there) > 10
    assert not {name for name in there if not list(PROJECT.glob(name))}


def test_no_page_names_a_test() -> None:
    sources = [path.read_text() for path in (PROJECT / "tests").rglob("test_*.py")]
    tests = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    pages = [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")]
    assert len(tests) > 500
    assert len(pages) > 10
    assert not {f"{page.name}: {name}" for page in pages for name in tests & words(page)}


def words(page: Path) -> set[str]:
    return set(re.findall(r"\w+", page.read_text()))
