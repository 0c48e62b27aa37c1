"""Data files: reading and writing parquet and JSONL, and the examples a run trains or evaluates on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.cli import invocation
from harness.errors import UserError
from harness.paths import locate

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One prompt with what its completions are scored against.

    `env_class` is empty where the file names none; `index` is the row's place in the concatenated files.
    """

    prompt: list[dict[str, str]]
    env_class: str
    ground_truth: str
    index: int
    question: str


def load_examples(paths: Sequence[str | Path]) -> list[Example]:
    """The examples of parquet or JSONL files, in order; raises UserError naming the file and what is wrong with it."""
    examples: list[Example] = []
    for name in paths:
        path = locate(str(name)) or Path(name)
        rows = read_rows(path)
        require_columns(rows, ("prompt", "reward_spec"), path)
        for number, row in enumerate(rows, start=1):
            examples.append(_example(row, len(examples), f"{path}, row {number}"))
    return examples


def read_rows(path: Path) -> list[Row]:
    """All rows of a .parquet or .jsonl file; raises UserError when it is missing, unreadable or empty."""
    if not os.path.isfile(path):
        raise UserError(
            "data file not found", got=path, fix=f"check the path; {invocation('prepare')} writes data files"
        )
    if path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        rows = _read_jsonl(path)
    else:
        raise UserError("unknown kind of data file", got=path, allowed="a name ending in .parquet or .jsonl")
    if not rows:
        raise UserError("the data file has no rows", got=path)
    return rows


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as parquet, whole or not at all; raises UserError when the folder cannot be written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary, compression="zstd")
        temporary.replace(path)
    except OSError as error:
        raise UserError("cannot write the data file", got=f"{path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # renamed already, or never made
            temporary.unlink()


def require_columns(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Raise UserError unless every row has a value in each of the columns."""
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise UserError(
                f"the data file lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
                got=f"{path}, row {number}, with {', '.join(sorted(map(str, row))) or 'no columns'}",
                allowed=f"rows with {', '.join(columns)}",
            )


def _example(row: Row, index: int, where: str) -> Example:
    messages, spec = row["prompt"], row["reward_spec"]
    if not _is_chat(messages):
        raise UserError(
            "a prompt is not a chat",
            got=f"{where}: {str(messages)[:80]}",
            allowed='[{"role": "user", "content": "..."}]',
        )
    if not isinstance(spec, dict) or spec.get("ground_truth") is None:
        raise UserError(
            "reward_spec has no ground_truth", got=where, allowed='{"method": "rule", "ground_truth": "18"}'
        )
    question = (row.get("extra_info") or {}).get("question") or messages[-1]["content"]
    return Example(messages, row.get("env_class") or "", str(spec["ground_truth"]), index, question)


def _is_chat(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError("the file cannot be read as parquet", got=f"{path}: {str(error).splitlines()[0]}") from None
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError("a line is not a JSON object", got=f"{path}, line {number}: {line.strip()[:80]}")
                rows.append(row)
    except json.JSONDecodeError as error:
        raise UserError("a line is not valid JSON", got=f"{path}, line {number}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError("the file is not UTF-8 text", got=f"{path}: {error.reason}") from None
    return rows
