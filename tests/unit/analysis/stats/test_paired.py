"""Paired differences over problems, whose answers by several seeds are one cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.data.tables import load
from analysis.stats.paired import final_rewards, paired_difference

RNG = np.random.default_rng(7)


def answers(chance: np.ndarray, seeds: int) -> pd.DataFrame:
    """Right or wrong by problem and seed, each problem as hard for every seed."""
    rows = RNG.random((len(chance), seeds)) < chance[:, None]
    index, seed = np.indices(rows.shape)
    return pd.DataFrame(
        {"index": index.ravel(), "seed": seed.ravel(), "reward": rows.ravel().astype(float)}
    )


def test_a_difference_and_its_error_by_hand() -> None:
    first = pd.DataFrame({"index": [0, 1, 2, 3], "seed": 0, "reward": [1.0, 1.0, 0.0, 1.0]})
    second = pd.DataFrame({"index": [0, 1, 2, 3], "seed": 0, "reward": [0.0, 1.0, 0.0, 0.0]})
    found = paired_difference(first, second)
    assert found is not None
    assert found.effect.value == 0.5
    gaps = np.array([1.0, 0.0, 0.0, 1.0])
    # One answer a cluster: the mean's error, by the sandwich's small-sample factor n / (n - 1).
    assert found.effect.se == pytest.approx(np.sqrt(((gaps - 0.5) ** 2).sum() / 4 / 3))
    assert (found.problems, found.seeds) == (4, 1)


def test_the_error_covers_and_ignoring_clusters_would_not() -> None:
    """Problems that one model finds easier than the other, over five seeds: the seeds' answers are
    not independent.
    """
    covered, naive = 0, 0
    for _ in range(200):
        easy = RNG.random(80)
        shift = RNG.normal(0, 0.4, 80)
        first, second = answers(np.clip(easy + shift, 0, 1), 5), answers(easy, 5)
        truth = 0.0
        found = paired_difference(first, second)
        assert found is not None
        low, high = found.effect.interval(0.025)
        covered += low <= truth <= high
        gaps = first["reward"] - second["reward"]
        half = 1.96 * gaps.std() / np.sqrt(len(gaps))
        naive += abs(gaps.mean() - truth) <= half
    assert covered >= 180
    assert naive < covered


def test_only_what_both_answered_counts() -> None:
    first, second = answers(np.full(10, 0.5), 2), answers(np.full(6, 0.5), 1)
    found = paired_difference(first, second)
    assert found is not None
    assert (found.problems, found.seeds) == (6, 1)
    assert paired_difference(first[first["index"] == 0], second) is None


def test_final_rewards_are_the_last_evaluations(sweep_dir: Path) -> None:
    samples = load([sweep_dir]).samples
    last = final_rewards(samples)
    assert len(last) == 12 * 8
    assert set(last["reward"]) == {1.0}
    assert set(samples["reward"]) == {0.0, 1.0}
