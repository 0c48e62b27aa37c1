"""Sweeps over the values of one setting with a known truth: how often a decision about them is
wrong.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.data.labels import LR
from analysis.stats.effects import GAIN_SHARE
from analysis.stats.values import ValueComparison, compare_values
from tests.unit.analysis.simulation import BASE, GAIN, NOISE

Floats = NDArray[np.float64]
RATES = {1: (1.0,), 3: (0.55, 1.0, 0.8)}
"""What is kept of the gain at each learning rate."""
FRESH = 100
"""The first fresh seed."""


@dataclass(frozen=True)
class Choice:
    """A sweep over values: how far each is behind the best, in standard deviations of a seed, and
    how it scatters.

    `noises`: each value's noise, as a multiple of `noise`. `rates`: learning rates tried with each
    value; at `flat` ones all are as good. `confirm`: so many of the best configurations are run
    again on fresh seeds. `collapse`: the share of each value's seeds that end at the base.
    """

    name: str
    behind: tuple[float, ...]
    noises: tuple[float, ...] = ()
    seeds: int = 3
    rates: int = 1
    flat: bool = False
    confirm: int = 0
    gain: float = GAIN
    noise: float = NOISE
    collapse: tuple[float, ...] = ()
    design: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def truth(self) -> Floats:
        """Each value's mean score at its best learning rate `[K]`, collapses counted."""
        scores = BASE + self.gain - self.noise * np.array(self.behind)
        return scores - np.array(self.collapse or (0.0,) * len(scores)) * (scores - BASE)

    def table(self, rng: np.random.Generator) -> pd.DataFrame:
        """One sweep as rows of `Tables.runs`."""
        count, kept = (
            len(self.behind),
            np.array((1.0,) * self.rates if self.flat else RATES[self.rates]),
        )
        value = np.repeat(np.arange(count), self.rates)
        means = (BASE + self.gain - self.noise * np.array(self.behind))[value]
        means = BASE + (means - BASE) * np.tile(kept, count)
        swept = self._draw(rng, means, value, self.seeds)
        parts = [(np.arange(len(value)), swept, 0)]
        if self.confirm:
            best = np.argsort(-swept.mean(axis=1), kind="stable")[: self.confirm]
            parts.append(
                (best, self._draw(rng, means[best], value[best], max(2, self.seeds)), FRESH)
            )
        frames = []
        for cells, scores, first in parts:
            seeds = scores.shape[1]
            frames.append(
                pd.DataFrame(
                    {
                        "configuration": np.repeat(cells, seeds),
                        "seed": np.tile(np.arange(first, first + seeds), len(cells)),
                        "rank": np.repeat(value[cells] + 1, seeds),
                        LR: np.repeat(10.0 ** (cells % self.rates - 3), seeds),
                        "full": False,
                        "confirm": bool(first),
                        "diverged": False,
                        "score": scores.ravel(),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)

    def _draw(
        self, rng: np.random.Generator, means: Floats, value: NDArray[np.int64], seeds: int
    ) -> Floats:
        noise = self.noise * np.array(self.noises or (1.0,) * len(self.behind))[value]
        scores = means[:, None] + noise[:, None] * rng.standard_normal((len(means), seeds))
        falls = (
            rng.random(scores.shape)
            < np.array(self.collapse or (0.0,) * len(self.behind))[value][:, None]
        )
        return np.where(falls, BASE + self.noise * rng.standard_normal(scores.shape), scores)

    def decide(self, rng: np.random.Generator) -> ValueComparison:
        """Compare the values on one sweep, as the report does."""
        runs = self.table(rng)
        fresh = runs[runs["confirm"]]
        means = (fresh if len(fresh) else runs).groupby("configuration")["score"].mean()
        others = [LR] if self.rates > 1 else []
        found = compare_values(runs, "rank", int(str(means.idxmax())), others, BASE, maximize=True)
        assert found is not None
        return found

    def shares(self, sweeps: int, seed: int = 0) -> dict[str, float]:
        """How often a decision was wrong, by kind, and how often each verdict came.

        `wrong best`: another value is as good or better; `wrong worse`: of a value that is not;
        `wrong tied`: of a value behind by the margin or more; `unstable best`: of a value with a
        collapsed seed.
        """
        rng, truth, counts = (
            np.random.default_rng([seed, zlib.crc32(self.name.encode())]),
            self.truth,
            Counter[str](),
        )
        for _ in range(sweeps):
            found = self.decide(rng)
            chosen = truth[found.chosen.value - 1]
            lead = {level.value: chosen - truth[level.value - 1] for level in found.others}
            best = found.verdict == "best"
            counts["wrong best"] += best and min(lead.values()) <= 1e-9
            counts["wrong worse"] += any(lead[level.value] <= 1e-9 for level in found.of("worse"))
            margin = GAIN_SHARE * self.gain
            counts["wrong tied"] += any(
                abs(lead[level.value]) >= margin - 1e-9 for level in found.of("tied")
            )
            counts["unstable best"] += best and found.chosen.collapsed > 0
            counts[found.verdict] += 1
        kinds = ("wrong best", "wrong worse", "wrong tied", "unstable best", "best", "tied", "open")
        return {kind: counts[kind] / sweeps for kind in kinds}


def _alike(count: int, seeds: int = 3, words: str = "", **world: Any) -> Choice:
    name = f"{count} values alike, {seeds} seed{'s' * (seeds > 1)}{words and ', '}{words}"
    return Choice(name, (0.0,) * count, seeds=seeds, **world)


def _ahead(count: int, seeds: int, words: str, by: float, **world: Any) -> Choice:
    return Choice(
        f"{count} values, {seeds} seeds, {words}",
        (0.0,) + (by,) * (count - 1),
        seeds=seeds,
        **world,
    )


def _stable() -> Iterator[Choice]:
    for count in (2, 4, 8, 12):
        for seeds in (2, 3, 5) if count in (2, 12) else (2, 3):
            yield _alike(count, seeds)
    yield _alike(8, words="twice the noise", noise=2 * NOISE)
    for count in (2, 6, 12):
        for seeds in (2, 3):
            yield _alike(
                count, seeds, "one three times as noisy", noises=(3.0,) + (1.0,) * (count - 1)
            )
    for count in (6, 12):
        noises = tuple(1 + 2 * place / (count - 1) for place in range(count))
        yield _alike(count, words="noise from one to three times", noises=noises)
    for count in (3, 8):
        for seeds in (2, 3):
            yield _alike(count, seeds, "each at three learning rates", rates=3)
        yield _alike(count, words="each at three rates as good as each other", rates=3, flat=True)
    for count in (2, 8):
        for seeds in (2, 3):
            yield _alike(count, seeds, "nothing learns", gain=0.0)
    for count, best in ((3, 2), (8, 4)):
        for seeds in (1, 2, 3):
            yield _alike(count, seeds, f"the best {best} confirmed", confirm=best)
    for count in (3, 8, 12):
        yield Choice(
            f"{count} values, 3 seeds, each 0.3 deviations apart",
            tuple(0.3 * i for i in range(count)),
        )
    for count in (2, 8):
        for seeds in (2, 3, 5):
            yield _ahead(count, seeds, "one ahead by the margin", GAIN_SHARE * GAIN / NOISE)
    for seeds in (2, 3, 5):
        yield _ahead(8, seeds, "one ahead by twice the margin", 2 * GAIN_SHARE * GAIN / NOISE)


def _collapsing() -> Iterator[Choice]:
    for count in (2, 8):
        for seeds in (2, 3, 5):
            yield _alike(
                count, seeds, "each collapses in 5% of its seeds", collapse=(0.05,) * count
            )
    for count in (2, 8):
        for seeds in (2, 3, 5):
            falls = (0.3,) + (0.0,) * (count - 1)
            yield _ahead(
                count, seeds, "the highest collapses in 30% of its seeds", 3.0, collapse=falls
            )


STABLE = tuple(_stable())
"""Worlds without collapses."""
COLLAPSING = tuple(_collapsing())
"""Worlds in which seeds collapse."""
