"""An environment for models with random weights.

Rewards differ between completions, so all of them train.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path


def prompt(question: str) -> list[dict[str, str]]:
    """Return the question as the user's message."""
    return [{"role": "user", "content": question}]


def reward(completion: str, ground_truth: str) -> float:
    """Return a number from 0 to 1 that depends on every character of the completion."""
    return zlib.crc32(f"{ground_truth} {completion}".encode()) / 2**32


def prepare(source: Sequence[Path] | None, output_dir: Path) -> dict[str, int]:
    """Write problems of 128 tokens; no source is read."""
    from tests.gpu.shapes import write_problems

    return {"train": len(write_problems(output_dir, 128).read_text().splitlines())}
