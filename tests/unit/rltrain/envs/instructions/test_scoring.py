"""Ground truths are read or refused; completions score 1, or 0 for reasons that are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.core.errors import UserError
from rltrain.data.files import read_rows
from rltrain.envs.instructions import can_score, prepare, reward
from rltrain.envs.instructions.constraints import OWN
from rltrain.envs.instructions.scoring import Task, failures, read_task
from tests.security.test_rewards import LONG, ODD
from tests.unit.rltrain.envs.instructions.test_constraints import CASES

LOWERCASE = Task(
    (("change_case:english_lowercase", {}), ("length:at_most_words", {"num_words": 6})),
    "short sentence",
    ("winter", "snow", "cold"),
    "Write one short sentence about winter in lowercase. Use at most six words.",
)
TRUTH = LOWERCASE.to_ground_truth()
IFEVAL_ROWS: list[dict[str, Any]] = [
    {
        "key": 1,
        "prompt": "Write a rhyme about a fox without commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    },
    {
        "key": 2,
        "prompt": "Write three words or more. Put them in quotes.",
        "instruction_id_list": ["length_constraints:number_words", "startend:quotation"],
        "kwargs": [
            {"relation": "at least", "num_words": 3, "keyword": None},
            {"relation": None, "num_words": None, "keyword": None},
        ],
    },
]


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        ("winter is cold.", []),
        ("  winter is cold. \n", []),
        ("Winter is cold.", ["change_case:english_lowercase"]),
        ("winter is so very cold in may.", ["length:at_most_words"]),
        ("winter is cold", ["unfinished"]),
        ("my dog is asleep.", ["not about the topic"]),
        ("", ["empty"]),
        ("ADEEPYESTER!", ["change_case:english_lowercase", "too few words"]),
        ("w" * 10_000, ["too long"]),
    ],
)
def test_a_completion_scores_1_or_it_is_told_why_not(completion: str, why: list[str]) -> None:
    told = failures(completion, LOWERCASE)
    assert set(why) <= set(told)
    assert bool(why) == bool(told)
    assert reward(completion, TRUTH) == float(not why)


def test_a_ground_truth_is_read_as_it_was_written() -> None:
    assert read_task(TRUTH) == LOWERCASE
    assert can_score(TRUTH)


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"instruction_id_list": [], "kwargs": []},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
        {"instruction_id_list": ["punctuation:no_commas"], "kwargs": [{}]},
        {"instruction_id_list": ["length:lines"], "kwargs": [{"num_lines": "2"}]},
        {**json.loads(TRUTH), "form": "haiku"},
        {**json.loads(TRUTH), "form": ["sentence"]},
        {**json.loads(TRUTH), "topic": "winter"},
        {**json.loads(TRUTH), "prompt": None},
    ],
)
def test_what_is_no_ground_truth_scores_0(content: object) -> None:
    assert not can_score(json.dumps(content))
    assert reward("winter is cold.", json.dumps(content)) == 0.0


@pytest.mark.parametrize("truth", ["", "2", "{", "[" * 100_000, "NaN", "null"])
def test_what_is_no_json_scores_0(truth: str) -> None:
    assert not can_score(truth)
    assert reward("winter is cold.", truth) == 0.0


@settings(deadline=None)  # the first call loads the list of words
@given(st.text())
def test_any_completion_has_a_score(completion: str) -> None:
    assert reward(completion, TRUTH) in (0.0, 1.0)
    assert reward(completion, TRUTH) == reward(completion, TRUTH)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", sorted(OWN))
def test_hostile_completions_score_for_every_kind(kind: str) -> None:
    kwargs = next(kwargs for name, kwargs, *_ in CASES if name == kind)
    alone = Task(((kind, kwargs),))
    for completion in (*LONG, *ODD, "(" * 200_000, ", and" * 50_000, "1. a\n" * 50_000):
        assert set(failures(completion, alone)) <= {kind, "empty"}


def test_ifevals_rows_are_scored_by_their_constraints_alone(tmp_path: Path) -> None:
    source = tmp_path / "input_data.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in IFEVAL_ROWS))
    assert prepare([source], tmp_path / "out") == {"ifeval": 2}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ifeval.parquet"]
    first, second = read_rows(tmp_path / "out" / "ifeval.parquet")
    assert first["prompt"] == [{"role": "user", "content": IFEVAL_ROWS[0]["prompt"]}]
    assert first["env_class"] == "instructions"
    assert reward("blorf", first["reward_spec"]["ground_truth"]) == 1.0
    assert reward(" \n", first["reward_spec"]["ground_truth"]) == 0.0
    assert reward("a, b", first["reward_spec"]["ground_truth"]) == 0.0
    assert reward('"one two three"', second["reward_spec"]["ground_truth"]) == 1.0
    assert reward("one two three", second["reward_spec"]["ground_truth"]) == 0.0
    assert reward('"one two"', second["reward_spec"]["ground_truth"]) == 0.0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"instruction_id_list": ["punctuation:none"]}, "instruction 'punctuation:none'"),
        ({"kwargs": [{"num_words": 3}]}, "kwargs num_words of punctuation:no_comma"),
        ({"kwargs": []}, "1 instructions and 0 kwargs"),
        ({"kwargs": "none"}, "no instruction_id_list or kwargs"),
        ({"prompt": 3}, "row 2: 3"),
    ],
)
def test_a_bad_row_of_a_source_is_named(
    tmp_path: Path, change: dict[str, object], told: str
) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [IFEVAL_ROWS[0], {**IFEVAL_ROWS[0], **change}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as raised:
        prepare([source], tmp_path / "out")
    assert told in str(raised.value)
    assert "rows.jsonl, row 2" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_source_without_the_columns_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "Write.", "kwargs": []}\n')
    with pytest.raises(UserError, match="lacks the column instruction_id_list"):
        prepare([source], tmp_path)
