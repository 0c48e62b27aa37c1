"""Importance: what was made to matter has the largest share, and chance is named as that."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from analysis.figures import importance
from analysis.figures.theme import Look, render
from analysis.labels import LR, RANK
from tests.unit.analysis.figures.made import made


def trials(**changes: Any) -> list[dict[str, Any]]:
    """The learning rate decides, rank does nothing, seeds differ a little."""
    chance = np.random.default_rng(0)
    return [
        {
            "rank": rank,
            "lr": lr,
            "seed": seed,
            "score": 0.9 * math.exp(-0.5 * (math.log10(lr) + 3) ** 2) + chance.normal(0, 0.01),
            **changes,
        }
        for rank in (1, 8)
        for lr in (1e-5, 1e-4, 1e-3, 1e-2)
        for seed in (0, 1, 2)
    ]


def test_the_setting_that_decides_comes_first_and_the_other_is_not_told_from_chance() -> None:
    plot = importance.data(made(trials()))[0]
    shares: importance.Shares = plot.data
    alone = shares.table.set_index("key")["fanova"]
    assert alone.index[0] == LR
    assert alone[LR] > 0.9
    assert alone[RANK] < 0.05
    assert 0 <= shares.noise < 0.05
    assert "Of the variance of 24 scores, alone: learning rate 9" in plot.reading
    assert "Rough, with only 24 runs." in plot.reading


def test_runs_on_fresh_seeds_and_failed_ones_have_no_part() -> None:
    again = [{**row, "seed": 7, "confirm": True} for row in trials()[:3]]
    failed = [{"rank": 8, "lr": 0.1, "seed": 0, "score": None, "status": "FAILED"}]
    assert importance.data(made([*trials(), *again, *failed]))[0].data.runs == 24


def test_too_few_runs_or_equal_scores_are_no_figure() -> None:
    assert importance.data(made(trials()[:6])) == []
    assert importance.data(made(trials(score=0.5))) == []


@pytest.mark.parametrize("look", [Look(), Look(dark=True, narrow=True)], ids=str)
def test_draws_two_bars_a_setting(look: Look) -> None:
    svg = render(partial(importance.draw, importance.data(made(trials()))[0].data), look).decode()
    for text in ("learning rate", "rank", "seed", "in combination", "fANOVA", "PED-ANOVA"):
        assert text in svg
