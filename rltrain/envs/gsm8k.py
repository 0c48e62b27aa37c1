"""GSM8K: grade-school math, scored on the number after the last `####`.

Cobbe et al. 2021, arXiv:2110.14168.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from harness.core.errors import UserError

PROMPT_SUFFIX = 'Let\'s think step by step and output the final answer after "####".'
MARKER = "####"

# A sign before or after a dollar sign (all optional), digits with thousands commas, a fraction.
_NUMBER = re.compile(r"([-−]\s?)?\$?\s?([-−])?([0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+)(\s?/\s?[0-9])?")
_HUB_REPOSITORY = "openai/gsm8k"
_HUB_FILES = ("main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet")


def prompt(question: str) -> list[dict[str, str]]:
    """Return the chat for a question: one user message, the question and the instruction."""
    return [{"role": "user", "content": f"{question} {PROMPT_SUFFIX}"}]


def reward(completion: str, ground_truth: str) -> float:
    """Return 1.0 if the number after the completion's last `####` is the ground truth, else 0.0.

    Numbers are compared by value. The ground truth is a number, or a worked solution that ends in
    `####` and one.
    """
    answer = final_number(completion)
    return 1.0 if answer is not None and answer == _truth(ground_truth) else 0.0


def can_score(ground_truth: str) -> bool:
    """Return whether the ground truth holds a number."""
    return _truth(ground_truth) is not None


def _truth(ground_truth: str) -> Decimal | None:
    return final_number(ground_truth) if MARKER in ground_truth else _number(ground_truth)


def final_number(completion: str) -> Decimal | None:
    """Return the number that a person would read after the last `####`, None where there is none.

    Currency signs, thousands commas, units and a trailing point do not matter; of `2+3=5` the
    result is read.
    """
    _, marker, tail = completion.rpartition(MARKER)
    lines = tail.strip().splitlines()
    return _number(lines[0].rpartition("=")[2]) if marker and lines else None


def _number(text: str) -> Decimal | None:
    match = _NUMBER.search(text)
    if match is None:
        return None
    minus, inner_minus, digits, fraction = match.groups()
    if fraction:  # 18/2 is not 18
        return None
    value = Decimal(digits.replace(",", ""))
    return value.copy_negate() if minus or inner_minus else value


def row(question: str, answer: str, split: str, index: int, *, data_source: str) -> dict[str, Any]:
    """Return one row of a data file; `answer` is a worked solution ending in `#### N`."""
    return {
        "data_source": data_source,
        "prompt": prompt(question),
        "env_class": "gsm8k",
        "reward_spec": {"method": "rule", "ground_truth": answer.rpartition(MARKER)[2].strip()},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


def prepare(source: Sequence[Path] | None, output_dir: Path) -> dict[str, int]:
    """Write train.parquet and validation.parquet from local files, or from the hub.

    Files named *train* become the train split, files named *test* the validation split. Returns the
    rows of each split. Raises UserError for bad files, before anything is written.
    """
    from rltrain.data.files import split_of_file, write_rows

    files: dict[str, list[Path]] = {"train": [], "validation": []}
    for path in source if source is not None else _download():
        files[split_of_file(path)].append(path)
    for split, word in (("train", "train"), ("validation", "test")):
        if not files[split]:
            raise UserError(
                f"no source file for the {split} split",
                got=", ".join(map(str, source or ())) or "no files",
                fix=f"add a file with {word} in its name",
            )
    rows = {split: _read_split(paths, split) for split, paths in files.items()}
    for split, split_rows in rows.items():
        write_rows(split_rows, output_dir / f"{split}.parquet")
    return {split: len(split_rows) for split, split_rows in rows.items()}


def _read_split(paths: Sequence[Path], split: str) -> list[dict[str, Any]]:
    from rltrain.data.files import read_rows, require_columns

    rows: list[dict[str, Any]] = []
    for path in paths:
        source_rows = read_rows(path)
        require_columns(source_rows, ("question", "answer"), path)
        for number, source_row in enumerate(source_rows, start=1):
            question, answer = source_row["question"], source_row["answer"]
            if not isinstance(question, str) or not isinstance(answer, str):
                raise UserError("question and answer must be text", got=f"{path}, row {number}")
            if final_number(answer) is None:
                raise UserError(
                    "an answer does not end in #### and a number",
                    got=f"{path}, row {number}: {answer[-60:]!r}",
                )
            rows.append(row(question, answer, split, len(rows), data_source=_HUB_REPOSITORY))
    return rows


def _download() -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return [
            Path(hf_hub_download(_HUB_REPOSITORY, name, repo_type="dataset")) for name in _HUB_FILES
        ]
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"cannot download {_HUB_REPOSITORY} from the hub",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            fix="check the network, or name local files: --source train.jsonl test.jsonl",
        ) from None
