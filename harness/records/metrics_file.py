"""The JSONL file of a run's metrics."""

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

# More steps than any run has, and exact as a float.
MOST_STEPS = 2**53


class MetricsFile:
    """`metrics.jsonl`: one JSON object per step, synced to disk; non-finite values are null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, float]) -> None:
        """Append a row; raises UserError for an undefined metric."""
        for name in row:
            lookup(name)
        clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with named(self.path), self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, float]]:
        """Return all rows, null as NaN, without a last line that a kill cut short.

        Raises UserError naming the line for a damaged row.
        """
        rows = []
        for number, line in enumerate(self._lines(), 1):
            row = _row(line)
            if row is None:
                raise UserError(
                    f"line {number} of {self.path.name} is damaged{_fault(line)}",
                    got=f"{self.path}: {line[:60]!r}",
                )
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
        return rows

    def truncate(self, step: int) -> None:
        """Remove the rows after a step, which a resumed run logs again."""
        kept = b""
        for line in self._lines():
            row = _row(line)
            if row is None or row["step"] > step:
                break
            kept += line
        write_bytes(self.path, kept)

    def mark(self) -> dict[str, Any]:
        """Return the file's length and SHA-256, with which a checkpoint later finds damage."""
        content = self.path.read_bytes()
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def damage(self, mark: Mapping[str, Any] | None = None) -> str | None:
        """Return what is wrong with the rows before a mark, or with any row; None if nothing is."""
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
    """Yield the lines of a file, without a last line that a kill cut short."""
    *lines, _ = content.split(b"\n")
    for line in lines:
        yield line + b"\n"


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a line's row, or None for a damaged line."""
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
    """Return the wrong value of a damaged line as the end of a sentence; "" if it is no JSON."""
    with contextlib.suppress(ValueError, AttributeError):
        for name, value in json.loads(line).items():
            if value is not None and type(value) not in (int, float):
                return f": {name} is {json.dumps(value)[:60]}, allowed: a number or null"
    return ""
