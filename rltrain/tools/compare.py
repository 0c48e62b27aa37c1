"""Two runs of one recipe compared step by step: metrics without timings, samples, trained
weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from harness.config.metrics import without_timings
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir

if TYPE_CHECKING:
    import torch

Row = Mapping[str, float]
ACCURACY = "eval/accuracy"
ABSENT = "absent"
UNREADABLE = "unreadable"
SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Departure:
    """Where two runs differ: the step, of what, the two values, and by how much; infinite for what
    is no number.
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
class Comparison:
    """All that differs of what two runs both have to show, in the order of the steps, and how much
    was compared.
    """

    departures: list[Departure]
    rows: int
    completions: int
    policies: list[str]

    def first(self, tolerance: float) -> Departure | None:
        """The first difference larger than the tolerance."""
        return next(
            (departure for departure in self.departures if departure.size > tolerance), None
        )

    @property
    def largest(self) -> Departure | None:
        """The largest difference, the first of several."""
        return max(self.departures, key=lambda departure: departure.size, default=None)

    def verdict(self, tolerance: float) -> str:
        """`identical`, `equal within` the largest difference, or where the runs depart and by how
        much.
        """
        first, largest = self.first(tolerance), self.largest
        if largest is None:
            return f"identical: {self._compared()}"
        if first is None:
            where = f"step {largest.step}, {largest.what}"
            return (
                f"equal within {_bound(largest.size)} (largest difference: {where}): "
                f"{self._compared()}"
            )
        text = f"departs at {first}; differences in all: {len(self.departures)}"
        return (
            text
            if largest is first or not math.isfinite(largest.size)
            else f"{text}, the largest at {largest}"
        )

    def _compared(self) -> str:
        weights = f"weights {' and '.join(self.policies)}" if self.policies else "no weights"
        return f"{self.rows} rows of metrics, {self.completions} completions, {weights}"


def compare(one: RunDir, other: RunDir, *, last: int, weights: bool) -> Comparison:
    """Compare two runs up to the step `last`; `weights` too where the first run ended in good
    order.
    """
    rows, others = rows_until(one, last), rows_until(other, last)
    departures = [
        d
        for step in sorted({*rows, *others})
        for d in compare_rows(step, rows.get(step), others.get(step))
    ]
    completions = 0
    for step in sorted({*_sampled(one, last), *_sampled(other, last)}):
        count, found = _samples(step, one.eval_samples(step), other.eval_samples(step))
        completions += count
        departures += found
    policies = [name for name in ("best", "final") if weights and _either(name, one, other)]
    for name in policies:
        departures += _weights(_step_of(name, rows), name, one.adapter / name, other.adapter / name)
    return Comparison(
        sorted(departures, key=lambda departure: departure.step), len(rows), completions, policies
    )


def rows_until(run: RunDir, last: int) -> dict[int, Row]:
    """Rows of a run's `metrics.jsonl` by step, without timings."""
    return {
        int(r["step"]): without_timings(r)
        for r in MetricsFile(run.metrics).rows()
        if r["step"] <= last
    }


def compare_rows(step: int, one: Row | None, other: Row | None) -> list[Departure]:
    """What differs between two rows of metrics of a step, in the order of the first row; None for
    no row.
    """
    if one is None or other is None:
        return [
            Departure(
                step, "metrics", *(("a row", "no row") if other is None else ("no row", "a row"))
            )
        ]
    departures = []
    for name in dict.fromkeys([*one, *other]):
        was, now = one.get(name), other.get(name)
        if was is None or now is None:
            departures.append(Departure(step, name, _number(was), _number(now)))
        elif was != now and (math.isfinite(was) or math.isfinite(now)):
            size = abs(now - was) if math.isfinite(was) and math.isfinite(now) else math.inf
            departures.append(Departure(step, name, _number(was), _number(now), size))
    return departures


def _sampled(run: RunDir, last: int) -> list[int]:
    steps = [int(file.stem.removeprefix("step_")) for file in run.samples.glob("step_*.parquet")]
    return [step for step in steps if step <= last]


def _samples(step: int, one: Path, other: Path) -> tuple[int, list[Departure]]:
    """How many completions two files of samples hold at most, and the first thing in which each
    pair differs.
    """
    firsts, seconds = _frame(one), _frame(other)
    if isinstance(firsts, str) or isinstance(seconds, str):
        was, now = (
            found if isinstance(found, str) else f"{len(found)} rows" for found in (firsts, seconds)
        )
        return 0, [Departure(step, "samples", was, now)]
    departures, nothing = [], dict[Any, Any]()
    for number, (first, second) in enumerate(
        itertools.zip_longest(firsts, seconds, fillvalue=nothing)
    ):
        name = next((n for n in [*first, *second] if _text(first, n) != _text(second, n)), None)
        if name is not None:
            departures.append(
                Departure(step, f"sample {number}'s {name}", _cut(first, name), _cut(second, name))
            )
    return max(len(firsts), len(seconds)), departures


def _frame(file: Path) -> list[dict[Any, Any]] | str:
    """The rows of a file of samples, or why there are none."""
    if not file.is_file():
        return ABSENT
    try:
        return pd.read_parquet(file).to_dict("records")
    except (OSError, ValueError):
        return UNREADABLE


def _text(row: Mapping[Any, Any], name: Any) -> str:
    return repr(row[name]) if name in row else ABSENT


def _cut(row: Mapping[Any, Any], name: Any) -> str:
    text = _text(row, name)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.9g}"


def _bound(size: float) -> str:
    """A difference in two digits, rounded up: everything is within it."""
    if size == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(size)) - 1)
    return f"{math.ceil(size / unit) * unit:.2g}"


def _either(name: str, *runs: RunDir) -> bool:
    return any((run.adapter / name).is_dir() for run in runs)


def _step_of(name: str, rows: Mapping[int, Row]) -> int:
    """The step of `adapter/best`, the first of the best evaluations after a step, or of
    `adapter/final`.
    """
    evaluated = [step for step, row in rows.items() if ACCURACY in row and step > 0]
    if name == "best" and evaluated:
        return max(evaluated, key=lambda step: rows[step][ACCURACY])
    return max(rows, default=0)


def _weights(step: int, policy: str, one: Path, other: Path) -> Iterator[Departure]:
    """The tensors of two folders in which they differ."""
    first, second = _tensors(one), _tensors(other)
    if isinstance(first, str) or isinstance(second, str):
        was, now = (
            given if isinstance(given, str) else f"{len(given)} tensors"
            for given in (first, second)
        )
        yield Departure(step, f"weights {policy}", was, now)
        return
    for name in sorted({*first, *second}):
        before, after = first.get(name), second.get(name)
        what = f"weights {policy}: {name}"
        if (
            before is None
            or after is None
            or before.shape != after.shape
            or before.dtype != after.dtype
        ):
            yield Departure(step, what, _kind(before), _kind(after))
        elif (found := _farthest(before, after)) is not None:
            yield Departure(step, what, *found)


def _tensors(folder: Path) -> dict[str, torch.Tensor] | str:
    """All tensors in a folder, or why there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = {
            n: tensor
            for file in sorted(folder.glob("*.safetensors"))
            for n, tensor in load_file(file).items()
        }
    except (OSError, SafetensorError):
        return UNREADABLE
    return found or ABSENT


def _kind(tensor: torch.Tensor | None) -> str:
    return (
        ABSENT
        if tensor is None
        else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    )


def _farthest(was: torch.Tensor, now: torch.Tensor) -> tuple[str, str, float] | None:
    """The two values that differ most and by how much; None when all are equal to the bit."""
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
    place = int(gap.argmax())
    before, after = (_number(float(tensor.reshape(-1)[place])) for tensor in (was, now))
    return before, after, float(gap[place])
