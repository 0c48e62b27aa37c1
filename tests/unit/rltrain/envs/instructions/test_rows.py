"""Sampled rows are deterministic, can all be won, and ask for what they score."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from rltrain.data.files import read_rows
from rltrain.envs.instructions import SPLIT_SIZES, UNSEEN_SIZE, prepare
from rltrain.envs.instructions.constraints import CONSTRAINTS, OWN
from rltrain.envs.instructions.rows import PROMPTS, sample, vocabulary
from rltrain.envs.instructions.scoring import Task, failures, read_task
from tests.unit.rltrain.envs.instructions.solver import solve

SPLITS = [("train", False), ("validation", False), ("test", False), ("test", True)]


def tasks(split: str, size: int, *, unseen: bool = False) -> list[Task]:
    found = [
        read_task(row["reward_spec"]["ground_truth"]) for row in sample(split, size, unseen=unseen)
    ]
    assert None not in found
    return [task for task in found if task is not None]


@pytest.mark.parametrize(("split", "unseen"), SPLITS)
def test_every_row_can_be_won(split: str, unseen: bool) -> None:
    lost = [
        (task.prompt, solve(task), why)
        for task in tasks(split, 512, unseen=unseen)
        if (why := failures(solve(task), task))
    ]
    assert not lost, lost[:10]


def test_an_ideal_answer_of_one_kind_does_not_win_the_others() -> None:
    one_of_each: dict[str, Task] = {}
    for task in tasks("train", 512) + tasks("train", 128, unseen=True):
        if len(task.constraints) == 1:
            one_of_each.setdefault(task.constraints[0][0], task)
    assert len(one_of_each) == len(vocabulary()["kinds"])
    wins = Counter[str]()
    for task in one_of_each.values():
        for kind, other in one_of_each.items():
            # Of the constraint alone: the answers are about other topics.
            (constraint,) = other.constraints
            wins[kind] += CONSTRAINTS[kind].holds(solve(task), **constraint[1])
    # A few ask only to leave something out, or to be short, which most answers do.
    easy = {kind for kind, count in wins.items() if count > len(one_of_each) / 2}
    assert easy <= {
        "keywords:letter_absent",
        "keywords:forbidden_words",
        "length:at_most_words",
        "length:short_words",
        "punctuation:no_comma",
        "startend:not_first_word",
    }


def test_kinds_come_equally_often_and_one_row_in_six_combines_two() -> None:
    rows = tasks("train", 2048)
    pairs = [task for task in rows if len(task.constraints) == 2]
    assert 0.14 < len(pairs) / len(rows) < 0.2
    counts = Counter(kind for task in rows for kind, _ in task.constraints)
    seen = {kind["id"] for kind in vocabulary()["kinds"] if not kind.get("unseen")}
    assert set(counts) == seen
    assert min(counts.values()) > 40


def test_the_same_call_gives_the_same_rows() -> None:
    assert sample("train", 64) == sample("train", 64)
    assert sample("train", 64) != sample("test", 64)


def test_the_files_are_apart(tmp_path: Path) -> None:
    assert prepare(None, tmp_path) == {**SPLIT_SIZES, "test_unseen": UNSEEN_SIZE}
    topics: dict[str, set[tuple[str, ...]]] = {}
    kinds: dict[str, set[str]] = {}
    for split in (*SPLIT_SIZES, "test_unseen"):
        rows = read_rows(tmp_path / f"{split}.parquet")
        assert len({row["extra_info"]["question"] for row in rows}) == len(rows)
        found = [read_task(row["reward_spec"]["ground_truth"]) for row in rows]
        topics[split] = {task.topic for task in found if task}
        kinds[split] = {kind for task in found if task for kind, _ in task.constraints}
        for row in rows:
            assert row["env_class"] == "instructions"
            assert row["prompt"][-1] == {"role": "user", "content": row["extra_info"]["question"]}
            assert row["extra_info"]["split"] == split
    for one, other in itertools.combinations(SPLIT_SIZES, 2):
        assert not topics[one] & topics[other]
    assert topics["test_unseen"] <= topics["test"]
    assert kinds["train"] == kinds["validation"] == kinds["test"]
    assert len(kinds["test_unseen"]) >= 6
    assert not kinds["test_unseen"] & kinds["train"]


def test_prompts_show_what_is_asked() -> None:
    for row in sample("train", 1024):
        task = read_task(row["reward_spec"]["ground_truth"])
        assert task is not None
        prompt = row["extra_info"]["question"]
        assert "{" not in prompt.replace('{"', ""), prompt
        assert len(prompt.split()) <= 32, prompt
        for _, kwargs in task.constraints:
            for name, value in kwargs.items():
                values = value if isinstance(value, list) else [value]
                for shown in values:
                    if isinstance(shown, str) and not name.endswith("relation"):
                        assert shown in prompt, prompt


def test_most_prompts_follow_an_example_that_is_an_answer() -> None:
    with_example = {kind["id"] for kind in vocabulary()["kinds"] if "example" in kind}
    topics = {topic for names in vocabulary()["topics"].values() for topic in names}
    rows = sample("train", 1024) + sample("test", 256, unseen=True)
    kept = set()
    followed = [row for row in rows if len(row["prompt"]) == 3]
    assert 0.6 < len(followed) / len(rows) < 0.75
    for row in followed:
        task = read_task(row["reward_spec"]["ground_truth"])
        assert task is not None
        request, example, prompt = row["prompt"]
        assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
        about = re.search(r"about (\w+)", request["content"])
        assert about is not None
        assert about[1] not in topics
        assert about[1] not in prompt["content"]
        constraints = task.constraints
        kind, kwargs = constraints[0]
        if "prompt_to_repeat" in kwargs:
            constraints = ((kind, {"prompt_to_repeat": example["content"].split("\n")[0]}),)
        if kind not in with_example or len(constraints) == 2:
            constraints = ()
        kept |= {kind for kind, _ in constraints}
        shown = Task(constraints, task.form, (about[1], "head"))
        assert failures(example["content"], shown) == []
        # Copying the example wins nothing, whatever the topic.
        copied = Task((), task.form, (about[1], "head"), task.prompt)
        if task.form not in ("list", "lines"):
            assert "copy of the prompt" in failures(example["content"], copied)
    assert kept == with_example


def test_the_vocabulary_is_large_and_small() -> None:
    content = vocabulary()
    topics = [topic for names in content["topics"].values() for topic in names]
    assert len(topics) == len(set(topics)) >= 120
    assert len(content["kinds"]) >= 25
    assert len({kind["id"] for kind in content["kinds"]}) == len(content["kinds"])
    assert set(OWN) <= {kind["id"] for kind in content["kinds"]} <= set(CONSTRAINTS)
    for kind in content["kinds"]:
        assert len(kind["phrasings"]) >= 3
    assert PROMPTS.stat().st_size < 30_000


def test_no_prompt_forbids_what_it_asks_for() -> None:
    for task in tasks("train", 2048):
        arguments = dict(task.constraints)
        letter = arguments.get("keywords:letter_absent", {}).get("letter")
        first = arguments.get("startend:first_word", {}).get("first_word", "")
        last = arguments.get("startend:last_word", {}).get("last_word", "")
        banned = arguments.get("keywords:forbidden_words", {}).get("forbidden_words", [])
        if letter:
            assert letter not in first + last, task.prompt
            assert any(letter not in word for word in task.topic), task.prompt
        assert first not in banned
        assert last not in banned
