"""The JSONL file that a run's metrics go to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.config.metrics import lookup
from harness.core.errors import UserError
from harness.records.files import named, write_bytes

# More than any run has, and still a whole number wherever it is read.
MOST_STEPS = 2**53


class MetricsFile:
    """`metrics.jsonl`: one object per step, flushed to disk as it is written. Non-finite values are
    written as null.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row; raises UserError for a metric that is not defined above."""
        for name in row:
            lookup(name)
        clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with named(self.path), self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, float]]:
        """Every whole row; null reads as NaN. A last line cut short by a kill is left out.

        Raises UserError naming the line for one that is damaged.
        """
        found = []
        for number, line in enumerate(self._lines(), 1):
            row = _row(line)
            if row is None:
                raise UserError(
                    f"line {number} of {self.path.name} is damaged{_fault(line)}",
                    got=f"{self.path}: {line[:60]!r}",
                )
            found.append(
                {name: math.nan if value is None else value for name, value in row.items()}
            )
        return found

    def truncate(self, step: int) -> None:
        """Keep the rows up to a step: what a resumed run had logged past its checkpoint is logged
        again.
        """
        kept = b""
        for line in self._lines():
            row = _row(line)
            if row is None or row["step"] > step:
                break
            kept += line
        write_bytes(self.path, kept)

    def mark(self) -> dict[str, Any]:
        """How long the file is and its SHA-256, for a checkpoint to know later whether its rows are
        whole.
        """
        content = self.path.read_bytes()
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def damage(self, mark: Mapping[str, Any] | None = None) -> str | None:
        """What is wrong with the rows that were there at a mark, None if nothing; without a mark,
        with any row.
        """
        name, content = self.path.name, self.path.read_bytes() if self.path.exists() else b""
        marked = content if mark is None else content[: mark["bytes"]]
        for number, line in enumerate(_whole_lines(marked), 1):
            if _row(line) is None:
                return f"line {number} of {name} is damaged"
        if mark is None:
            return None
        if len(marked) < mark["bytes"]:
            return f"{name} has lost rows: {len(content)} of {mark['bytes']} bytes are there"
        same = hashlib.sha256(marked).hexdigest() == mark["sha256"]
        return None if same else f"{name} was changed: its SHA-256 is not the one that was written"

    def _lines(self) -> Iterator[bytes]:
        yield from _whole_lines(self.path.read_bytes() if self.path.exists() else b"")


def _whole_lines(content: bytes) -> Iterator[bytes]:
    """The lines of a file; the last is left out when a kill cut it short."""
    *lines, _ = content.split(b"\n")
    for line in lines:
        yield line + b"\n"


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's row; None when it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if (
        not isinstance(row, dict)
        or type(row.get("step")) is not int
        or abs(row["step"]) > MOST_STEPS
    ):
        return None
    return (
        row if all(value is None or type(value) in (int, float) for value in row.values()) else None
    )


def _fault(line: bytes) -> str:
    """Which value of a damaged line is none, as the end of a sentence; "" where it is no row at
    all.
    """
    with contextlib.suppress(ValueError, AttributeError):
        for name, value in json.loads(line).items():
            if value is not None and type(value) not in (int, float):
                return f": {name} is {json.dumps(value)[:60]}, allowed: a number or null"
    return ""
