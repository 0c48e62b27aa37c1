"""Data files: examples in order, and every kind of bad file named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from rltrain.data import Example, load_examples, read_rows, write_rows


def row(number: int) -> dict[str, Any]:
    return {
        "data_source": "test",
        "prompt": [{"role": "user", "content": f"prompt {number}"}],
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": str(number)},
        "extra_info": {"split": "train", "index": number, "answer": f"#### {number}", "question": f"question {number}"},
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
    assert examples[2] == Example([{"role": "user", "content": "prompt 9"}], "gsm8k", "9", 2, "question 9")


def test_env_class_and_extra_info_may_be_left_out(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}]
    bare = {"prompt": chat, "reward_spec": {"ground_truth": 5}}
    assert load_examples([write_jsonl([bare], tmp_path / "x.jsonl")]) == [Example(chat, "", "5", 0, "q")]


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
        ("x.jsonl", b'{"prompt": [{"role": "user", "content": "q"}]}\n', "column reward_spec"),
        ("x.jsonl", b'{"text": "q"}\n', "columns prompt, reward_spec"),
        ("x.jsonl", b'{"prompt": "q", "reward_spec": {"ground_truth": "1"}}\n', "not a chat"),
        ("x.jsonl", b'{"prompt": [], "reward_spec": {"ground_truth": "1"}}\n', "not a chat"),
        ("x.jsonl", b'{"prompt": [{"role": "user", "content": "q"}], "reward_spec": {}}\n', "no ground_truth"),
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
