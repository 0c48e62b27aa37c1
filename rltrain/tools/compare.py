"""Compare two runs of one recipe step by step: metrics, samples and trained weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from harness.config.metrics import ACCURACY, without_timings
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir

if TYPE_CHECKING:
    import torch

Row = Mapping[str, float]
ABSENT = "absent"
UNREADABLE = "unreadable"
SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class RunDifference:
    """A difference between two runs: step, what differs, both values, and by how much.

    `size` is infinite where the values are not numbers.
    """

    step: int
    what: str
    was: str
    now: str
    size: float = math.inf

    def __str__(self) -> str:
        by = f" (by {self.size:.3g})" if math.isfinite(self.size) else ""
        return f"step {self.step}: {self.what} {self.was} -> {self.now}{by}"


@dataclass(frozen=True, slots=True)
class RunComparison:
    """All differences between two runs, by step, and how much was compared."""

    differences: list[RunDifference]
    rows: int
    completions: int
    policies: list[str]

    def first(self, tolerance: float) -> RunDifference | None:
        """Return the first difference larger than the tolerance."""
        return next(
            (difference for difference in self.differences if difference.size > tolerance), None
        )

    @property
    def largest(self) -> RunDifference | None:
        """The largest difference, the first of several."""
        return max(self.differences, key=lambda difference: difference.size, default=None)

    def verdict(self, tolerance: float) -> str:
        """Return `identical`, `equal within` the largest difference, or where the runs differ."""
        first, largest = self.first(tolerance), self.largest
        if largest is None:
            return f"identical: {self._compared()}"
        if first is None:
            where = f"step {largest.step}, {largest.what}"
            return (
                f"equal within {_bound(largest.size)} (largest difference: {where}): "
                f"{self._compared()}"
            )
        text = f"departs at {first}; differences in all: {len(self.differences)}"
        return (
            text
            if largest is first or not math.isfinite(largest.size)
            else f"{text}, the largest at {largest}"
        )

    def _compared(self) -> str:
        weights = f"weights {' and '.join(self.policies)}" if self.policies else "no weights"
        return f"{self.rows} rows of metrics, {self.completions} completions, {weights}"


def compare(one: RunDir, other: RunDir, *, last: int, weights: bool) -> RunComparison:
    """Compare two runs up to the step `last`, and their weights if `weights` is set."""
    rows, others = rows_until(one, last), rows_until(other, last)
    differences = [
        d
        for step in sorted({*rows, *others})
        for d in compare_rows(step, rows.get(step), others.get(step))
    ]
    completions = 0
    sampled = {
        int(file.stem.removeprefix("step_"))
        for run in (one, other)
        for file in run.samples.glob("step_*.parquet")
    }
    for step in sorted(step for step in sampled if step <= last):
        count, differing = _samples(step, one.eval_samples(step), other.eval_samples(step))
        completions += count
        differences += differing
    policies = [
        name
        for name in ("best", "final")
        if weights and any((run.adapter / name).is_dir() for run in (one, other))
    ]
    for name in policies:
        differences += _weights(
            _step_of(name, rows), name, one.adapter / name, other.adapter / name
        )
    return RunComparison(
        sorted(differences, key=lambda difference: difference.step),
        len(rows),
        completions,
        policies,
    )


def rows_until(run: RunDir, last: int) -> dict[int, Row]:
    """Return the rows of a run's `metrics.jsonl` by step, without timings."""
    return {
        int(r["step"]): without_timings(r)
        for r in MetricsFile(run.metrics).rows()
        if r["step"] <= last
    }


def compare_rows(step: int, one: Row | None, other: Row | None) -> list[RunDifference]:
    """Return the differences of two rows of metrics, in the order of the first; None is no row."""
    if one is None or other is None:
        return [
            RunDifference(
                step, "metrics", *(("a row", "no row") if other is None else ("no row", "a row"))
            )
        ]
    differences = []
    for name in dict.fromkeys([*one, *other]):
        was, now = one.get(name), other.get(name)
        if was is None or now is None:
            differences.append(RunDifference(step, name, _number(was), _number(now)))
        elif was != now and (math.isfinite(was) or math.isfinite(now)):
            size = abs(now - was) if math.isfinite(was) and math.isfinite(now) else math.inf
            differences.append(RunDifference(step, name, _number(was), _number(now), size))
    return differences


def _samples(step: int, one: Path, other: Path) -> tuple[int, list[RunDifference]]:
    """Return how many completions two sample files have, and each pair's first difference."""
    firsts, seconds = _frame(one), _frame(other)
    if isinstance(firsts, str) or isinstance(seconds, str):
        was, now = (
            rows if isinstance(rows, str) else f"{len(rows)} rows" for rows in (firsts, seconds)
        )
        return 0, [RunDifference(step, "samples", was, now)]
    differences, nothing = [], dict[Any, Any]()
    for number, (first, second) in enumerate(
        itertools.zip_longest(firsts, seconds, fillvalue=nothing)
    ):
        name = next((n for n in [*first, *second] if _text(first, n) != _text(second, n)), None)
        if name is not None:
            was, now = (
                text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
                for text in (_text(first, name), _text(second, name))
            )
            differences.append(RunDifference(step, f"sample {number}'s {name}", was, now))
    return max(len(firsts), len(seconds)), differences


def _frame(file: Path) -> list[dict[Any, Any]] | str:
    """Return the rows of a sample file, or why there are none."""
    if not file.is_file():
        return ABSENT
    try:
        return pd.read_parquet(file).to_dict("records")
    except (OSError, ValueError):
        return UNREADABLE


def _text(row: Mapping[Any, Any], name: Any) -> str:
    return repr(row[name]) if name in row else ABSENT


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.9g}"


def _bound(size: float) -> str:
    """Return a difference in two digits, rounded up."""
    if size == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(size)) - 1)
    return f"{math.ceil(size / unit) * unit:.2g}"


def _step_of(name: str, rows: Mapping[int, Row]) -> int:
    """Return the step of `adapter/final`, or of `adapter/best`.

    That is the first of the best evaluations after step 0.
    """
    evaluated = [step for step, row in rows.items() if ACCURACY in row and step > 0]
    if name == "best" and evaluated:
        return max(evaluated, key=lambda step: rows[step][ACCURACY])
    return max(rows, default=0)


def _weights(step: int, policy: str, one: Path, other: Path) -> Iterator[RunDifference]:
    """Yield the tensors in which two folders differ."""
    first, second = _tensors(one), _tensors(other)
    if isinstance(first, str) or isinstance(second, str):
        was, now = (
            tensors if isinstance(tensors, str) else f"{len(tensors)} tensors"
            for tensors in (first, second)
        )
        yield RunDifference(step, f"weights {policy}", was, now)
        return
    for name in sorted({*first, *second}):
        before, after = first.get(name), second.get(name)
        what = f"weights {policy}: {name}"
        was, now = (
            ABSENT
            if tensor is None
            else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for tensor in (before, after)
        )
        if before is None or after is None or was != now:
            yield RunDifference(step, what, was, now)
        elif (largest := _largest_gap(before, after)) is not None:
            yield RunDifference(step, what, *largest)


def _tensors(folder: Path) -> dict[str, torch.Tensor] | str:
    """Return all tensors in a folder, or why there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = {
            name: tensor
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
    except (OSError, SafetensorError):
        return UNREADABLE
    return tensors or ABSENT


def _largest_gap(was: torch.Tensor, now: torch.Tensor) -> tuple[str, str, float] | None:
    """Return the two values that differ most, and by how much; None if all bits are equal."""
    import torch

    if torch.equal(was.reshape(-1).view(torch.uint8), now.reshape(-1).view(torch.uint8)):
        return None
    gap = (
        (now.double() - was.double())
        .abs()
        .nan_to_num(nan=math.inf)
        .where(~(was.isnan() & now.isnan()), 0)
        .reshape(-1)
    )
    index = int(gap.argmax())
    before, after = (_number(float(tensor.reshape(-1)[index])) for tensor in (was, now))
    return before, after, float(gap[index])
