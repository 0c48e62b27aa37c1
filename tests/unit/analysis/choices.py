"""Sweeps over the values of one setting with a known truth: how often a decision about them is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.labels import LR
from analysis.levels import GAIN_SHARE, Comparison, compare_values
from tests.unit.analysis.simulation import BASE, GAIN, NOISE, hash_of

Floats = NDArray[np.float64]
RATES = {1: (1.0,), 3: (0.55, 1.0, 0.8)}
"""What is kept of the gain at each learning rate."""
FRESH = 100
"""The first fresh seed."""


@dataclass(frozen=True)
class Choice:
    """A sweep over values: how far each is behind the best, in standard deviations of a seed, and how it scatters.

    `noises`: each value's noise, as a multiple of `noise`. `rates`: learning rates tried with each value; at `flat`
    ones all are as good. `confirm`: so many of the best configurations are run again on fresh seeds. `collapse`: the
    share of each value's seeds that end at the base.
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
        count, kept = len(self.behind), np.array((1.0,) * self.rates if self.flat else RATES[self.rates])
        value = np.repeat(np.arange(count), self.rates)
        means = (BASE + self.gain - self.noise * np.array(self.behind))[value]
        means = BASE + (means - BASE) * np.tile(kept, count)
        swept = self._draw(rng, means, value, self.seeds)
        parts = [(np.arange(len(value)), swept, 0)]
        if self.confirm:
            best = np.argsort(-swept.mean(axis=1), kind="stable")[: self.confirm]
            parts.append((best, self._draw(rng, means[best], value[best], max(2, self.seeds)), FRESH))
        frames = []
        for cells, scores, first in parts:
            seeds = scores.shape[1]
            frames.append(pd.DataFrame({
                "configuration": np.repeat(cells, seeds), "seed": np.tile(np.arange(first, first + seeds), len(cells)),
                "rank": np.repeat(value[cells] + 1, seeds), LR: np.repeat(10.0 ** (cells % self.rates - 3), seeds),
                "full": False, "confirm": bool(first), "diverged": False, "score": scores.ravel(),
            }))  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def _draw(self, rng: np.random.Generator, means: Floats, value: NDArray[np.int64], seeds: int) -> Floats:
        noise = self.noise * np.array(self.noises or (1.0,) * len(self.behind))[value]
        scores = means[:, None] + noise[:, None] * rng.standard_normal((len(means), seeds))
        falls = rng.random(scores.shape) < np.array(self.collapse or (0.0,) * len(self.behind))[value][:, None]
        return np.where(falls, BASE + self.noise * rng.standard_normal(scores.shape), scores)

    def decide(self, rng: np.random.Generator) -> Comparison:
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

        `wrong best`: another value is as good or better; `wrong worse`: of a value that is not; `wrong tied`: of a
        value behind by the margin or more; `unstable best`: of a value with a collapsed seed.
        """
        rng, truth, counts = np.random.default_rng([seed, hash_of(self.name)]), self.truth, Counter[str]()
        for _ in range(sweeps):
            found = self.decide(rng)
            chosen = truth[found.chosen.value - 1]
            lead = {level.value: chosen - truth[level.value - 1] for level in found.others}
            best = found.verdict == "best"
            counts["wrong best"] += best and min(lead.values()) <= 1e-9
            counts["wrong worse"] += any(lead[level.value] <= 1e-9 for level in found.of("worse"))
            margin = GAIN_SHARE * self.gain
            counts["wrong tied"] += any(abs(lead[level.value]) >= margin - 1e-9 for level in found.of("tied"))
            counts["unstable best"] += best and found.chosen.collapsed > 0
            counts[found.verdict] += 1
        kinds = ("wrong best", "wrong worse", "wrong tied", "unstable best", "best", "tied", "open")
        return {kind: counts[kind] / sweeps for kind in kinds}
