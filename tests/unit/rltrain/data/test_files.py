"""Data files: examples in order, and an error for every kind of bad file."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import Data
from harness.core.errors import UserError
from rltrain.data.files import Example, count_rows, load_examples, read_rows, write_rows


def row(number: int) -> dict[str, Any]:
    return {
        "data_source": "test",
        "prompt": [{"role": "user", "content": f"prompt {number}"}],
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": str(number)},
        "extra_info": {
            "split": "train",
            "index": number,
            "answer": f"#### {number}",
            "question": f"question {number}",
        },
    }


def write_jsonl(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_parquet_and_jsonl_concatenate_in_order(tmp_path: Path) -> None:
    write_rows([row(7), row(8)], tmp_path / "a.parquet")
    write_jsonl([row(9)], tmp_path / "b.jsonl")

    examples = load_examples([tmp_path / "a.parquet", str(tmp_path / "b.jsonl")])

    assert [(e.index, e.ground_truth, e.question) for e in examples] == [
        (0, "7", "question 7"),
        (1, "8", "question 8"),
        (2, "9", "question 9"),
    ]
    assert examples[2] == Example(
        [{"role": "user", "content": "prompt 9"}], "gsm8k", "9", 2, "question 9"
    )


def test_env_class_and_extra_info_may_be_left_out(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}]
    bare = {"prompt": chat, "reward_spec": {"ground_truth": 5}}
    assert load_examples([write_jsonl([bare], tmp_path / "x.jsonl")]) == [
        Example(chat, "", "5", 0, "q")
    ]


def test_rows_survive_parquet_and_no_temporary_file_stays(tmp_path: Path) -> None:
    write_rows([row(1), row(2)], tmp_path / "new" / "x.parquet")
    assert read_rows(tmp_path / "new" / "x.parquet") == [row(1), row(2)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.parquet"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.parquet", b"not parquet at all", "cannot be read as parquet"),
        ("x.jsonl", b"", "no rows"),
        ("x.jsonl", b'{"prompt": 1}\n{"pro', "line 2"),
        ("x.jsonl", b"3\n", "line 1"),
        ("x.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("x.csv", b"a,b\n", r"\.parquet or \.jsonl"),
        ("x.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1"),
        ("x.jsonl", b'{"a": ' + b"7" * 5000 + b"}\n", "line 1"),
        ("x.jsonl", b'{"a": "\\ud800"}\n', "line 1"),
        ("x.jsonl", b'{"a": {"\\uDFFF": 1}}\n', "line 1"),
        ("x.jsonl.gz", b'{"a": 1}\n', "cannot be read"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-4], "cannot be read"),
        ("x.jsonl", b'{"question": "q", "text": "t"}\n', "columns prompt, reward_spec"),
        ("x.jsonl", b'{"prompt": [{"role": "user", "content": "q"}]}\n', "column reward_spec"),
        ("x.jsonl", b'{"text": "q"}\n', "columns prompt, reward_spec"),
        ("x.jsonl", b'{"prompt": "q", "reward_spec": {"ground_truth": "1"}}\n', "not a chat"),
        ("x.jsonl", b'{"prompt": [], "reward_spec": {"ground_truth": "1"}}\n', "not a chat"),
        (
            "x.jsonl",
            b'{"prompt": [{"role": "user", "content": "q"}], "reward_spec": {}}\n',
            "no ground_truth",
        ),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as raised:
        load_examples([tmp_path / name])
    assert name in str(raised.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.parquet", tmp_path):
        with pytest.raises(UserError, match="not found") as raised:
            load_examples([path])
        assert str(path) in str(raised.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write") as raised:
        write_rows([row(1)], tmp_path / "file" / "x.parquet")
    assert "x.parquet" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"env_class": 3}, "env_class is not text"),
        ({"env_class": ["gsm8k"]}, "env_class is not text"),
        ({"extra_info": "train"}, "extra_info is not a mapping"),
        ({"extra_info": {"question": 3}}, "its question is not text"),
        ({"prompt": [[[[[[[[[["deep"]]]]]]]]]] * 99}, "not a chat"),
        *(
            ({"reward_spec": {"ground_truth": truth}}, "neither text nor a number")
            for truth in (float("nan"), float("inf"), "", " \n", [], ["5"], {}, {"target": "5"})
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    path = write_jsonl([row(1), row(2) | changes], tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=complaint) as raised:
        load_examples([path])
    assert "x.jsonl, row 2" in str(raised.value)


def test_numbers_and_truth_values_are_ground_truths(tmp_path: Path) -> None:
    truths = [5, 2.5, True, "5", 10**400]
    rows = [row(1) | {"reward_spec": {"ground_truth": truth}} for truth in truths]
    examples = load_examples([write_jsonl(rows, tmp_path / "x.jsonl")])
    assert [example.ground_truth for example in examples] == [
        "5",
        "2.5",
        "True",
        "5",
        f"1{'0' * 400}",
    ]


def test_a_byte_order_mark_and_gzip_simply_work(tmp_path: Path) -> None:
    plain = write_jsonl([row(1), row(2)], tmp_path / "x.jsonl").read_bytes()
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + plain)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain))
    for name in ("bom.jsonl", "x.jsonl.gz"):
        assert read_rows(tmp_path / name) == [row(1), row(2)]
        assert count_rows([str(tmp_path / name)]) == 2  # as a dry run counts them


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n')
    assert read_rows(tmp_path / "x.jsonl") == [{"a": "\U0001f600"}]


def test_a_column_that_python_cannot_hold_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    days = pa.array([10**7], pa.int64()).cast(pa.int64()).view(pa.timestamp("s"))
    far = pa.array([10**13], pa.int64()).view(pa.timestamp("s"))
    pq.write_table(pa.table({"a": ["x"], "when": days}), tmp_path / "near.parquet")
    pq.write_table(pa.table({"a": ["x"], "when": far}), tmp_path / "far.parquet")
    assert isinstance(read_rows(tmp_path / "near.parquet")[0]["when"], datetime.datetime)
    with pytest.raises(UserError, match=r"far\.parquet, column when"):
        read_rows(tmp_path / "far.parquet")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to("/proc/self/mem")  # an error in reading, for root as well
    with pytest.raises(UserError, match="data file cannot be read"):
        read_rows(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("question", "answer"),
    [("question", "answer"), ("problem", "solution"), ("query", "target"), ("prompt", "answer")],
)
def test_question_and_answer_are_guessed_and_said(
    tmp_path: Path, question: str, answer: str
) -> None:
    path = write_jsonl([{"id": 7, question: "2 + 3?", answer: 5}], tmp_path / "x.jsonl")
    said: list[str] = []
    assert load_examples([path], Data(), said.append) == [Example([], "", "5", 0, "2 + 3?")]
    assert [
        f"prompts from the column {question}, ground truths from {answer}" in line for line in said
    ] == [True]


def test_the_recipe_names_the_columns(tmp_path: Path) -> None:
    rows = [
        {"question": "wrong", "answer": "wrong", "ask": "2 + 3?", "truth": "5", "env_class": "math"}
    ]
    data, said = Data(question_column="ask", answer_column="truth"), list[str]()
    paths = [write_jsonl(rows, tmp_path / "x.jsonl"), write_jsonl([row(9)], tmp_path / "y.jsonl")]
    assert load_examples(paths, data, said.append) == [
        Example([], "math", "5", 0, "2 + 3?"),
        Example(row(9)["prompt"], "gsm8k", "9", 1, "question 9"),
    ]
    assert said == []
    with pytest.raises(UserError, match="lacks the column nowhere"):
        load_examples(paths, Data(question_column="nowhere"))


def test_a_question_may_be_a_chat_and_may_not_be_empty(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
    path = write_jsonl([{"prompt": chat, "answer": "5"}], tmp_path / "x.jsonl")
    assert load_examples([path]) == [Example(chat, "", "5", 0, "2 + 3?")]
    for bad in (" ", 3, ["2 + 3?"]):
        with pytest.raises(UserError, match="not a chat") as raised:
            load_examples([write_jsonl([{"question": bad, "answer": "5"}], tmp_path / "x.jsonl")])
        assert ", or text" in str(raised.value)
