"""Heatmaps of rank or alpha against the learning rate: their cells, and the lines of equal
alpha·lr.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest

from analysis.figures import heatmaps
from analysis.figures.drawing.grid import edges, octaves, rate_columns
from analysis.figures.drawing.theme import Look
from analysis.figures.heatmaps import exponent_of_alpha
from tests.unit.analysis import worlds
from tests.unit.analysis.figures.made import made, svg_of
from tests.unit.analysis.simulation import BEST, Arm, World, by_rank, by_scale


def alphas(exponent: float) -> World:
    """Rank 16 over alphas, with the best rate going as alpha to a power."""
    return World(
        tuple(
            Arm(16, alpha=a, best=BEST + exponent * math.log10(a / 32)) for a in (8.0, 32.0, 128.0)
        ),
        failures=0.0,
    )


def test_a_cell_per_rank_and_rate_holds_the_best_configuration() -> None:
    trials = [
        {"rank": rank, "lr": lr, "alpha": alpha, "score": score}
        for rank, lr, alpha, score in (
            (0, 1e-4, 32.0, 0.8),
            (8, 1e-4, 16.0, 0.3),
            (8, 1e-4, 32.0, 0.4),
            (8, 1e-3, 16.0, 0.9),
            (8, 1e-3, 32.0, 0.7),
        )
    ]
    lost = {"rank": 8, "lr": 1e-2, "status": "FAILED", "diverged": True}
    rank, alpha = heatmaps.data(made([*trials, lost]))
    cells = rank.data.cells.set_index(["value", "lr"])["mean"].to_dict()
    assert cells == {(8, 1e-3): 0.9, (0, 1e-4): 0.8, (8, 1e-4): 0.4}
    assert rank.data.diverged.values.tolist() == [[8.0, 1e-2, 1]]
    assert rank.reading.startswith("The best of 3 cells is rank 8 at 1e-3: 0.900 (1 seed).")
    assert "so other settings differ between cells" in rank.reading
    assert alpha.data.cells.set_index(["value", "lr"])["mean"].to_dict() == {
        (16.0, 1e-3): 0.9,
        (32.0, 1e-3): 0.7,
        (32.0, 1e-4): 0.4,
        (16.0, 1e-4): 0.3,
    }
    svg = svg_of(partial(heatmaps.draw, rank.data), Look())
    for text in ("0.900", "full", "some runs diverged"):
        assert text in svg


def test_on_every_line_alpha_times_lr_is_the_same() -> None:
    lines = heatmaps.data(worlds.experiment(alphas(-1.0)))[0].data.lines
    assert (lines["value"] * lines["lr"]).to_numpy() == pytest.approx(lines["constant"].to_numpy())
    by_rank_lines = heatmaps.data(worlds.experiment(by_scale(-0.5, failures=0.0)))[0].data.lines
    assert (2 * by_rank_lines["value"] * by_rank_lines["lr"]).to_numpy() == pytest.approx(
        by_rank_lines["constant"]
    )


def test_with_one_alpha_there_are_no_lines() -> None:
    plots = heatmaps.data(worlds.experiment(by_rank()))
    assert [plot.name for plot in plots] == ["heatmap_rank"]
    assert plots[0].data.lines.empty


@pytest.mark.parametrize(("power", "told"), [(-1.0, "is inside"), (0.0, "is outside")])
def test_the_exponent_of_alpha_is_found(power: float, told: str) -> None:
    covered = []
    for seed in range(10):
        slope = exponent_of_alpha(alphas(power).draw(np.random.default_rng(seed)))
        assert slope is not None
        low, high = slope.interval(0.025)
        covered.append(low <= power <= high)
    assert sum(covered) >= 9
    reading = heatmaps.data(worlds.experiment(alphas(power)))[-1].reading
    assert "The best rate goes as alpha to the power" in reading
    assert told in reading


def test_many_rates_are_put_together_by_thirds_of_a_decade() -> None:
    rates = pd.Series(np.logspace(-4, -2, 40))
    columns = rate_columns(rates, pd.Series(8.0, index=rates.index))
    assert columns.nunique() == 7
    assert np.abs(np.log10(columns / rates)).max() <= 1 / 6 + 1e-9
    # Of four rows with ten rates each none has too many.
    assert rate_columns(rates, pd.Series(np.arange(40) % 4)).tolist() == pytest.approx(
        rates.tolist(), rel=1e-5
    )


def test_cells_border_halfway_and_full_fine_tuning_is_a_step_below() -> None:
    assert edges([0.0, 1.0, 2.5]) == [(-0.5, 0.5), (0.5, 1.75), (1.75, 3.25)]
    assert edges([0.0, 1.0, 9.0]) == [(-0.5, 0.5), (0.5, 1.75), (8.25, 9.75)]
    assert edges([2.0], alone=0.5) == [(1.75, 2.25)]
    assert octaves([0, 4, 16]) == {0.0: 0.0, 4: 2.0, 16: 4.0}
