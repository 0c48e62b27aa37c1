"""The best learning rate by rank: as the claims estimate it, and right on sweeps with a known
truth.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.claims import judge
from analysis.figures import best_lr_by_rank
from analysis.figures.best_lr_by_rank import best_rates
from tests.unit.analysis import worlds
from tests.unit.analysis.figures.made import made
from tests.unit.analysis.simulation import BEST, World, by_rank, by_scale


def test_intervals_cover_the_true_rates_exponent_and_ratio() -> None:
    world, sweeps = by_rank(exponent=-0.5, failures=0.0), 20
    truth = {0: BEST - math.log10(9.8), 1: BEST} | {
        r: BEST - 0.5 * math.log10(r / 4) for r in (4, 16, 64)
    }
    ratio = np.mean([truth[rank] for rank in (4, 16, 64)]) - truth[0]
    inside: dict[str, list[bool]] = {"rates": [], "exponent": [], "ratio": []}
    for seed in range(sweeps):
        best = best_rates(world.draw(np.random.default_rng(seed)), "alpha")
        assert best is not None
        assert best.exponent is not None
        assert best.ratio is not None
        points = best.points.set_index("rank")
        assert points["located"].all()
        inside["rates"] += [points.low[r] <= 10 ** truth[r] <= points.high[r] for r in truth]
        for name, estimate, value in (
            ("exponent", best.exponent, -0.5),
            ("ratio", best.ratio, ratio),
        ):
            low, high = estimate.interval(0.025)
            inside[name].append(bool(low <= value <= high))
        assert best.exponent.interval(0.025)[1] < -0.25
    for found in inside.values():
        assert np.mean(found) >= 0.9


def test_the_estimates_are_the_claims_own() -> None:
    e = by_rank(failures=0.0).draw(np.random.default_rng(0))
    best = best_rates(e, "alpha")
    effects = {verdict.id: verdict.effect for verdict in judge(e)}
    assert best is not None
    assert best.exponent is not None
    assert best.ratio is not None
    assert (best.exponent.value, best.ratio.value) == (effects["2a"], effects["3"])


def test_reads_as_its_numbers() -> None:
    plots = best_lr_by_rank.data(worlds.experiment(by_rank(failures=0.0)))
    assert [plot.name for plot in plots] == ["best_lr_by_rank"]
    reading = plots[0].reading
    assert reading.startswith("At alpha 32 the best rate goes as rank to the power ")
    assert "ranks 4 to 64, 3 seeds). Of theory's exponents 0 inside, −1/4 and" in reading
    assert "10 is inside)." in reading


def test_alpha_in_proportion_to_rank_has_a_plot_of_its_own() -> None:
    plots = best_lr_by_rank.data(worlds.experiment(by_scale(-0.5, failures=0.0)))
    assert [plot.name for plot in plots] == ["best_lr_by_rank_scaled"]
    assert plots[0].title == "Best learning rate by rank, at alpha 2 × rank"
    assert "−1/2 inside, 0 and −1/4 outside the interval." in plots[0].reading


@pytest.mark.parametrize(
    ("world", "why"),
    [
        (by_rank(flat=True), "still good at the end of the tested rates"),
        (by_rank(seeds=1), "has fewer than two seeds at its good learning rates"),
    ],
)
def test_what_is_not_located_is_said_and_has_no_interval(world: World, why: str) -> None:
    plot = best_lr_by_rank.data(worlds.experiment(world))[0]
    assert why in plot.reading
    assert "no exponent of rank can be fitted" in plot.reading
    assert not plot.data.points["located"].any()
    assert plot.data.points["low"].isna().all()
    assert plot.data.ratio is None


def test_ranks_at_one_rate_each_have_no_plot() -> None:
    trials = [
        {"rank": rank, "lr": lr, "score": 0.6, "seed": s}
        for rank, lr in ((1, 1e-3), (8, 1e-4))
        for s in (0, 1)
    ]
    assert best_lr_by_rank.data(made(trials)) == []
