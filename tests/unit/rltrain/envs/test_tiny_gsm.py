"""tiny_gsm's problems are deterministic, right, disjoint across splits, and equal to the files."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest

from harness.core.errors import UserError
from rltrain.data.files import read_rows
from rltrain.envs import gsm8k, tiny_gsm

SPLITS = ("train", "validation", "test")


def draw(split: str, seed: int, count: int) -> list[tiny_gsm.WordProblem]:
    return list(itertools.islice(tiny_gsm.problems(split, seed), count))


def content(question: str, answer: str) -> tuple[str, ...]:
    """What makes a problem that problem, names and objects aside: its quantities and its answer."""
    return (*re.findall(r"\d+", question), answer)


def test_same_seed_same_problems_other_seed_others() -> None:
    assert draw("train", 3, 200) == draw("train", 3, 200)
    assert draw("train", 3, 200) != draw("train", 4, 200)


def test_every_solution_computes_its_answer_from_the_question() -> None:
    seen_operators = set()
    for problem in draw("train", 0, 2000):
        assert "{" not in problem.solution + problem.question, problem
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        known |= {2, 7}  # twice, half; the days of a week
        result = None
        for step in problem.steps:
            ((left, operator, right, shown),) = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", step)
            assert {int(left), int(right)} <= known, problem
            result = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
                "/": int(left) / int(right),
            }[operator]
            assert result == int(shown), problem
            assert 1 <= result <= tiny_gsm.LARGEST
            known.add(int(result))
            seen_operators.add(operator)
        assert result == problem.answer
        assert problem.solution.endswith(f"\n#### {problem.answer}")
        assert gsm8k.reward(problem.solution, str(problem.answer)) == 1.0
    assert seen_operators == set("+-*/")


def test_every_template_and_phrasing_is_drawn() -> None:
    openings = {re.sub(r"\d+", "9", problem.steps[0]) for problem in draw("train", 0, 2000)}
    assert len(openings) > 300  # many names and objects
    counts = [len(problem.steps) for problem in draw("train", 0, 2000)]
    assert {1, 2, 3} == set(counts)
    assert all(counts.count(n) > 100 for n in (1, 2, 3))


def test_splits_are_disjoint_by_quantities_not_only_by_text(tiny_model_dir: Path) -> None:
    contents: dict[str, set[tuple[str, ...]]] = {}
    for split in SPLITS:
        rows = read_rows(tiny_model_dir / "data" / f"{split}.parquet")
        contents[split] = {
            content(row["extra_info"]["question"], row["reward_spec"]["ground_truth"])
            for row in rows
        }
    # What the base was trained on: the train split's kind, any seed.
    contents["train"] |= {content(p.question, str(p.answer)) for p in draw("train", 0, 20_000)}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not contents[one] & contents[other]


def test_files_hold_distinct_problems_that_run_through_gsm8k(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    assert tiny_gsm.prepare(None, tmp_path) == {"train": 2048, "validation": 512, "test": 1024}
    for split in SPLITS:
        rows = read_rows(tiny_model_dir / "data" / f"{split}.parquet")
        assert rows == read_rows(
            tmp_path / f"{split}.parquet"
        )  # the embedded files are what the command makes
        assert len({row["extra_info"]["question"] for row in rows}) == len(rows)
        for row in rows:
            assert row["env_class"] == "gsm8k"
            assert row["prompt"] == gsm8k.prompt(row["extra_info"]["question"])
            assert (
                gsm8k.reward(row["extra_info"]["answer"], row["reward_spec"]["ground_truth"]) == 1.0
            )


def test_a_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="makes its own problems"):
        tiny_gsm.prepare([tmp_path / "train.jsonl"], tmp_path)


def test_habits_score_as_they_should() -> None:
    rng = random.Random(0)
    problems = draw("train", 0, 1000)
    scores = {
        habit: sum(
            gsm8k.reward(tiny_gsm.answer_with_habit(p, habit, rng), str(p.answer)) for p in problems
        )
        / 1000
        for habit in tiny_gsm.HABITS
    }
    assert scores["reasoned"] == 1.0
    assert scores["unmarked"] == scores["bare"] == 0.0
    assert 0.0 < scores["guess"] < 0.15
    assert sum(tiny_gsm.HABITS.values()) == pytest.approx(1.0)
