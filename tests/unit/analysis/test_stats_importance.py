"""Importance through Optuna: what was made to matter comes first, and the seed has its own
share.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.stats_importance import SEED, importance

KEYS = ["trainer.policy.optimizer_config.lr", "trainer.target_modules"]


def runs(noise: float, count: int = 60) -> pd.DataFrame:
    """Scores that the learning rate decides, the target modules a little, and chance."""
    rng = np.random.default_rng(0)
    rates = rng.choice(10.0 ** np.linspace(-5, -2, 10), count // 3)
    targets = rng.choice(["mlp", "attention"], count // 3)
    table = pd.DataFrame(
        {
            KEYS[0]: np.repeat(rates, 3),
            KEYS[1]: np.repeat(targets, 3),
            SEED: list(range(3)) * (count // 3),
        }
    )
    bell = np.exp(-0.5 * ((np.log10(table[KEYS[0]]) + 3.5) / 0.6) ** 2)
    return table.assign(score=bell + 0.1 * (table[KEYS[1]] == "mlp") + rng.normal(0, noise, count))


def test_what_decides_comes_first() -> None:
    table = importance(runs(0.01), KEYS, "maximize")
    assert table["key"].iloc[0] == KEYS[0]
    assert table["fanova"].iloc[0] > 0.6
    assert table["ped_anova"].sum() == pytest.approx(1.0)
    shares = dict(zip(table["key"], table["fanova"], strict=True))
    assert shares[SEED] < 0.1
    assert table.attrs["noise"] < 0.05


def test_chance_between_seeds_is_said_to_be_that() -> None:
    assert importance(runs(2.0), KEYS, "maximize").attrs["noise"] > 0.4


def test_too_little_to_tell_is_an_empty_table() -> None:
    assert importance(runs(0.1).head(5), KEYS, "maximize").empty
    assert importance(runs(0.1).assign(score=0.5), KEYS, "maximize").empty


def test_failed_runs_have_no_part_and_absent_values_are_a_choice() -> None:
    table = runs(0.01)
    table.loc[::4, "score"] = np.nan
    table[KEYS[1]] = table[KEYS[1]].where(table[KEYS[1]] == "mlp")
    assert set(importance(table, KEYS, "maximize")["key"]) == {*KEYS, SEED}
