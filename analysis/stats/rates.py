"""Split the learning rates of a sweep into too low, good and too high."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from analysis.data import labels
from harness.config.metrics import Direction

# A learning rate is good when it keeps this share of the best gain over the base.
GOOD_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class RateSplit:
    """The learning rates tested and the good ones among them.

    `good` runs from the lowest to the highest rate that kept `GOOD_SHARE` of the best gain. It is
    empty when no rate rose above the base.
    """

    best: float | None
    tested: tuple[float, ...]
    good: tuple[float, ...]

    @property
    def too_low(self) -> tuple[float, ...]:
        """Learning rates tested below the good ones."""
        return tuple(lr for lr in self.tested if self.good and lr < self.good[0])

    @property
    def too_high(self) -> tuple[float, ...]:
        """Learning rates tested above the good ones."""
        return tuple(lr for lr in self.tested if self.good and lr > self.good[-1])

    def in_words(self) -> str:
        """Say in one line which learning rates are too low, good and too high."""
        if not self.good or self.best is None:
            return "no learning rate tested rose above the base."
        low, high = (
            f"{rate_span(rates)} {what}" if rates else f"nothing tested was {what}"
            for rates, what in ((self.too_low, "too low"), (self.too_high, "too high"))
        )
        best = f" (best {labels.lr(self.best)})" if len(self.good) > 1 else ""
        return f"{low}, {rate_span(self.good)} good{best}, {high}."


def rate_span(rates: tuple[float, ...]) -> str:
    """Write the lowest and the highest of some rates: `3e-4 to 1e-3`."""
    return " to ".join(dict.fromkeys([labels.lr(rates[0]), labels.lr(rates[-1])]))


def split_rates(points: pd.DataFrame, floor: float, direction: Direction) -> RateSplit:
    """Split the learning rates of `points` (columns lr, score, finished).

    `floor` is the base's score. A trial that did not finish (pruned) counts against its rate, never
    for it. A rate is judged by its best point, so that a bad value of another setting does not
    count against it.
    """
    sign = 1.0 if direction == "maximize" else -1.0
    tested = tuple(sorted(float(lr) for lr in points["lr"].unique()))
    gains = ((points["score"] - floor) * sign).where(points["finished"]).fillna(-math.inf)
    best_of = gains.groupby(points["lr"].astype(float)).max()
    if best_of.empty or best_of.max() <= 0:
        return RateSplit(None, tested, ())
    good = best_of[best_of >= GOOD_SHARE * best_of.max()].index
    between = tuple(lr for lr in tested if good.min() <= lr <= good.max())
    return RateSplit(float(str(best_of.idxmax())), tested, between)
