"""Data files: read and write parquet and JSONL, and the examples a run trains or evaluates on."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from harness.config.schema import Data
from harness.core.cli import invocation
from harness.core.errors import UserError
from harness.core.paths import locate

Row = dict[str, Any]
Chat = list[dict[str, str]]

JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
# Usual names of columns with a question and with its answer, in order of preference.
QUESTIONS = ("question", "problem", "prompt", "query")
ANSWERS = ("answer", "final_answer", "ground_truth", "solution", "target")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Example:
    """A prompt and the ground truth that its completions are scored against.

    `prompt` is empty where the file has only a question: its environment makes the prompt.
    `env_class` is empty where the file names none. `index` counts the rows of all files from 0,
    `where` is the file and its row, from 1.
    """

    prompt: Chat
    env_class: str
    ground_truth: str
    index: int
    question: str
    where: str = field(default="", compare=False)


def load_examples(
    paths: Sequence[str | Path], data: Data | None = None, say: Callable[[str], None] | None = None
) -> list[Example]:
    """Return the examples of parquet or JSONL files, in order.

    A file has `prompt` and `reward_spec`, or a question and an answer: the columns that `data`
    names, or else columns with a usual name, which are reported to `say`. Raises UserError naming
    the file and what is wrong with it.
    """
    examples: list[Example] = []
    for name in paths:
        path = locate(str(name)) or Path(name)
        rows = read_rows(path)
        columns = _question_and_answer(rows[0], data or Data())
        fix = "name other columns: data.question_column=NAME data.answer_column=NAME"
        require_columns(rows, columns or ("prompt", "reward_spec"), path, fix=fix)
        if columns and say and data and None in (data.question_column, data.answer_column):
            say(
                f"{name}: prompts from the column {columns[0]}, ground truths from {columns[1]} "
                "(data.question_column and data.answer_column name others)"
            )
        for number, row in enumerate(rows, start=1):
            examples.append(_example(row, columns, len(examples), f"{path}, row {number}"))
    return examples


def _question_and_answer(row: Row, data: Data) -> tuple[str, str] | None:
    """Return the columns of question and answer; None for a file with prompt and reward_spec.

    Columns that the recipe names apply to files that have them.
    """
    named = {data.question_column, data.answer_column} & row.keys()
    if not named and {"prompt", "reward_spec"} <= row.keys():
        return None
    question = data.question_column or next(
        (name for name in QUESTIONS if row.get(name) is not None), None
    )
    answer = data.answer_column or next(
        (name for name in ANSWERS if row.get(name) is not None), None
    )
    return None if question is None or answer is None else (question, answer)


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a parquet or JSONL file.

    Raises UserError when it is missing, unreadable or empty.
    """
    if not os.path.isfile(path):
        raise UserError(
            "data file not found",
            got=path,
            fix=f"check the path; {invocation('prepare')} writes data files",
        )
    if path.suffix == ".parquet":
        rows = _read_parquet(path)
    elif path.name.endswith(JSON_LINES):
        rows = _read_jsonl(path)
    else:
        raise UserError(
            "unknown kind of data file",
            got=path,
            allowed="a name ending in .parquet or .jsonl, or in .jsonl.gz",
        )
    if not rows:
        raise UserError("the data file has no rows", got=path)
    return rows


def count_rows(paths: Sequence[str]) -> int | None:
    """Return how many rows data files have together; None when one is missing or unreadable.

    Parquet files are not read beyond their metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = 0
    for name in paths:
        path = locate(name)
        # A device or a pipe may have no end.
        if path is None or not path.is_file():
            return None
        try:
            if path.suffix == ".parquet":
                total += int(pq.ParquetFile(path).metadata.num_rows)
            else:
                with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                    total += sum(1 for line in file if line.strip())
        except (OSError, EOFError, zlib.error, pa.ArrowException):
            return None
    return total if paths else None


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as parquet, atomically; raise UserError when the folder cannot be written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary, compression="zstd")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            "cannot write the data file", got=f"{path}: {error.strerror or error}"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never written
            temporary.unlink()


def split_of_file(path: Path) -> str:
    """Return "train" for a file named *train*, "validation" for one named *test*.

    Raises UserError for a name with neither or both.
    """
    is_train, is_test = "train" in path.name.lower(), "test" in path.name.lower()
    if is_train == is_test:
        raise UserError(
            "cannot tell the split from the file's name",
            got=path,
            allowed="a name with train or test in it",
        )
    return "train" if is_train else "validation"


def require_columns(
    rows: Sequence[Row], columns: Sequence[str], path: Path, *, fix: str | None = None
) -> None:
    """Raise UserError unless every row has a value in each of the columns."""
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise UserError(
                f"the data file lacks the column{'s' if len(missing) > 1 else ''} "
                f"{', '.join(missing)}",
                got=f"{path}, row {number}, with "
                f"{', '.join(sorted(map(str, row))) or 'no columns'}",
                allowed=f"rows with {', '.join(columns)}",
                fix=fix,
            )


def _example(row: Row, columns: tuple[str, str] | None, index: int, where: str) -> Example:
    env_class, extra_info = row.get("env_class") or "", row.get("extra_info") or {}
    if not isinstance(env_class, str):
        raise UserError(
            "env_class is not text",
            got=f"{where}: {_short(env_class)}",
            allowed="the environment's name",
        )
    if not isinstance(extra_info, dict) or not isinstance(extra_info.get("question") or "", str):
        raise UserError(
            "extra_info is not a mapping, or its question is not text",
            got=f"{where}: {_short(extra_info)}",
            allowed='{"question": "...", ...}, or none',
        )
    if columns is None:
        prompt, spec = row["prompt"], row["reward_spec"]
        if not isinstance(spec, dict) or spec.get("ground_truth") is None:
            raise UserError(
                "reward_spec has no ground_truth",
                got=where,
                allowed='{"method": "rule", "ground_truth": "18"}',
            )
        truth = spec["ground_truth"]
    else:
        prompt, truth = row[columns[0]], row[columns[1]]
    truth = _ground_truth(truth, where)
    if columns is not None and isinstance(prompt, str) and prompt.strip():
        return Example([], env_class, truth, index, prompt, where)
    if not is_chat(prompt):
        raise UserError(
            "a prompt is not a chat",
            got=f"{where}: {_short(prompt)}",
            allowed='[{"role": "user", "content": "..."}]'
            + (", or text" if columns is not None else ""),
        )
    question = extra_info.get("question") or prompt[-1]["content"]
    return Example(prompt, env_class, truth, index, question, where)


def _ground_truth(value: object, where: str) -> str:
    """Return a ground truth as text; raise UserError for one that no completion can match."""
    if isinstance(value, str):
        usable = bool(value.strip())
    else:
        usable = isinstance(value, int) or (
            isinstance(value, float | Decimal) and math.isfinite(value)
        )
    if not usable:
        raise UserError(
            "a ground truth is neither text nor a number",
            got=f"{where}: {_short(value)}",
            allowed="text that is not empty, a finite number, true or false",
            fix="write it as the text that the environment's reward reads",
        )
    return str(value)


def is_chat(messages: object) -> bool:
    """Return whether an object is a list of messages, each with a role and a content."""
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
    )


def _short(value: object) -> str:
    """Return a short representation of any value."""
    return reprlib.repr(value)[:80]


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            "the file cannot be read as parquet", got=f"{path}: {str(error).splitlines()[0]}"
        ) from None
    columns = []
    for name, column in zip(table.column_names, table.itercolumns(), strict=True):
        try:
            columns.append(column.to_pylist())
        # A year beyond 9999, text that is not UTF-8.
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise UserError(
                "a column holds values that Python cannot represent",
                got=f"{path}, column {name}: {str(error).splitlines()[0]}",
                fix="leave the column out, or write it as text",
            ) from None
    return [
        dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)
    ]


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_json_row(line, f"{path}, line {number}"))
    except UnicodeDecodeError as error:
        raise UserError("the file is not UTF-8 text", got=f"{path}: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("the data file cannot be read", got=f"{path}: {error}") from None
    return rows


def _json_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
        # Neither tokenizers nor parquet accept half of a surrogate pair.
        if _SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError("a line is nested too deep", got=where) from None
    except UnicodeEncodeError:
        raise UserError(
            "a line holds half of a surrogate pair, which is no character", got=where
        ) from None
    except ValueError as error:  # also raised for a number of thousands of digits
        raise UserError("a line is not valid JSON", got=f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise UserError("a line is not a JSON object", got=f"{where}: {line.strip()[:80]}")
    return row
