"""The expectations of a recipe (`expect`), judged by the mean over runs of different seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.config import metrics
from harness.core.errors import UserError

BOUNDS = ("min", "max")


@dataclass(frozen=True, slots=True)
class ExpectationResult:
    """A metric's mean over seeds, its 95% interval, and whether it is within the expected bounds.

    `low` and `high` are the t-interval of the mean; None with one run.
    """

    metric: str
    bounds: dict[str, float]
    values: list[float]
    mean: float
    low: float | None
    high: float | None
    met: bool

    def __str__(self) -> str:
        expected = " and ".join(
            f"{'>=' if name == 'min' else '<='} {limit:g}" for name, limit in self.bounds.items()
        )
        spread = (
            "one seed"
            if self.low is None
            else f"{len(self.values)} seeds, 95% {self.low:.4g} to {self.high:.4g}"
        )
        return (
            f"{'met' if self.met else 'NOT MET'}: {self.metric} {self.mean:.4g} "
            f"({spread}), expected {expected}"
        )

    def record(self) -> dict[str, Any]:
        """Return the fields as the manifest holds them."""
        return asdict(self)


def check_expectations(expect: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown metric, bounds that are no numbers, and an empty range."""
    for name, bounds in expect.items():
        metrics.lookup(name)
        if not isinstance(bounds, dict) or not bounds or set(bounds) - set(BOUNDS):
            raise UserError(
                f"expect.{name} must give bounds", got=bounds, allowed="{min: x}, {max: y} or both"
            )
        for key, limit in bounds.items():
            if (
                isinstance(limit, bool)
                or not isinstance(limit, int | float)
                or not math.isfinite(limit)
            ):
                raise UserError(f"expect.{name}.{key} must be a number", got=limit)
        if bounds.get("min", -math.inf) > bounds.get("max", math.inf):
            raise UserError(
                f"expect.{name} holds for no number", got=bounds, fix="swap min and max"
            )


def judge(
    expect: Mapping[str, Mapping[str, float]], runs: Sequence[Sequence[Mapping[str, float]]]
) -> list[ExpectationResult]:
    """Judge each expectation by the rows of `metrics.jsonl` of one or more runs."""
    return [
        _judge(name, dict(bounds), [_value(name, rows) for rows in runs])
        for name, bounds in expect.items()
    ]


def _value(name: str, rows: Sequence[Mapping[str, float]]) -> float:
    """Return a run's last evaluation, or of other metrics the mean over its later half."""
    values = [row[name] for row in rows if name in row and row["step"] > 0]
    if not values:
        return math.nan
    return values[-1] if name.startswith("eval/") else statistics.fmean(values[len(values) // 2 :])


def _judge(name: str, bounds: dict[str, float], values: list[float]) -> ExpectationResult:
    mean, low, high = statistics.fmean(values), None, None
    if len(values) > 1 and math.isfinite(mean):
        from scipy import stats

        half = (
            float(stats.t.ppf(0.975, len(values) - 1))
            * statistics.stdev(values)
            / math.sqrt(len(values))
        )
        low, high = mean - half, mean + half
    # The mean is NaN for a metric that was never logged, and within no bounds.
    met = bounds.get("min", -math.inf) <= mean <= bounds.get("max", math.inf)
    return ExpectationResult(name, bounds, values, mean, low, high, met)
