"""An environment for models with random weights: its rewards differ from completion to completion,
so all train.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path


def prompt(question: str) -> list[dict[str, str]]:
    """The question as the user's turn."""
    return [{"role": "user", "content": question}]


def reward(completion: str, ground_truth: str) -> float:
    """A number from 0 to 1 that depends on every character of the completion."""
    return zlib.crc32(f"{ground_truth} {completion}".encode()) / 2**32


def prepare(source: Sequence[Path] | None, output_dir: Path) -> dict[str, int]:
    """Write problems of 128 tokens; there is no source to read."""
    from tests.gpu.shapes import write_problems

    return {"train": len(write_problems(output_dir, 128).read_text().splitlines())}
