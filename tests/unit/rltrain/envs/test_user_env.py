"""Run the example environment of docs/guides/your_task.md as the page shows it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from harness.config import recipe as recipes
from harness.core.errors import UserError
from harness.core.paths import PROJECT
from rltrain.data.files import Example, load_examples
from rltrain.envs import env_names, get_env
from rltrain.envs.problems import load_problems
from rltrain.tools.preflight import check_run
from tests.recipes import quickstart

PAGE = (PROJECT / "docs" / "guides" / "your_task.md").read_text()


def block(language: str) -> str:
    """The page's only block of code in a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, with the example in `my_tasks/backwards.py`, as the working directory."""
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "backwards.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_documented_environment_runs_as_documented(folder: Path, tiny_model_dir: Path) -> None:
    prepare, run = (shlex.split(line) for line in block("sh").replace("\\\n", " ").splitlines())
    assert prepare[0] == run[0] == "python"
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, *prepare[1:]], cwd=folder, env=env, check=True)

    assert run[1:4] == ["-m", "harness.run", "recipes/quickstart.yaml"]
    recipe = recipes.load(PROJECT / run[3], run[4:])
    check_run(recipe)
    problems, dropped = load_problems(
        recipe, recipe.data.train_data, AutoTokenizer.from_pretrained(tiny_model_dir)
    )

    assert (len(problems), dropped) == (512, 0)
    for problem in problems[:20]:
        word, backwards = problem.example.question, problem.example.ground_truth
        assert problem.env is get_env("my_tasks.backwards")
        assert problem.env.reward(f" {backwards}\n", backwards) == 1.0
        assert problem.env.reward(backwards[:-1], backwards) == pytest.approx(
            (len(word) - 1) / len(word)
        )
        assert problem.env.reward("", backwards) == 0.0


def test_env_class_may_come_from_the_recipe(folder: Path, tiny_model_dir: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "abc"}], "reward_spec": {"ground_truth": "cba"}}
    (folder / "bare.jsonl").write_text(json.dumps(row))
    recipe = quickstart(["environment.env_class=my_tasks.backwards"])
    (problem,), _ = load_problems(
        recipe, ["bare.jsonl"], AutoTokenizer.from_pretrained(tiny_model_dir)
    )
    assert problem.env.reward("cba", problem.example.ground_truth) == 1.0
    assert problem.env.reward("#### 3", problem.example.ground_truth) < 1.0


def test_a_users_module_that_is_not_there_is_refused_before_anything_starts(
    folder: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(UserError, match=r"my_tasks\.forwards"):
        check_run(quickstart(["environment.env_class=my_tasks.forwards"]))


def test_the_documented_row_is_one_the_trainer_reads(tmp_path: Path) -> None:
    row: dict[str, Any] = json.loads(block("json"))
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    assert load_examples([tmp_path / "row.jsonl"]) == [
        Example(row["prompt"], "gsm8k", "5", 0, "What is 2 + 3?")
    ]
    assert get_env("gsm8k").reward(row["extra_info"]["answer"], "5") == 1.0


def test_the_page_names_every_built_in_environment() -> None:
    named = re.findall(
        r"^\| `(\w+)` \|", PAGE.partition("## Built in")[2].partition("## ")[0], re.MULTILINE
    )
    assert tuple(named) == env_names()
