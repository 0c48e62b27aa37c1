"""Score against trained parameters: sizes, intervals and the line of a bit an episode."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from analysis.figures import score_by_parameters
from analysis.figures.drawing.theme import Look
from tests.unit.analysis import worlds
from tests.unit.analysis.figures.made import made, svg_of
from tests.unit.analysis.simulation import BASE, GAIN, PER_STEP, STEPS, by_rank, placed


def test_sizes_scores_and_the_line_are_the_simulations() -> None:
    plot = score_by_parameters.data(
        worlds.experiment(by_rank({1: {"parameters": 1000, "height": 0.8}}, failures=0.0))
    )[0]
    points = plot.data.points.set_index("rank")
    assert points["parameters"].to_dict() == {
        1: 1000,
        4: 30_720,
        16: 122_880,
        64: 491_520,
        0: 750_000,
    }
    assert plot.data.needed == STEPS * PER_STEP / 2 == 2048
    for rank, height in {0: 1.0, 1: 0.8, 4: 1.0, 16: 1.0, 64: 1.0}.items():
        assert points.low[rank] - 0.02 <= BASE + GAIN * height <= points.high[rank] + 0.02
    assert plot.reading.startswith(
        "4,096 episodes teach at most one bit each. 2,048 parameters hold that, at 2 bits each, "
        "and 3 of 4 adapters have"
    )
    assert "the smallest, rank 1 on all-linear with 1,000 parameters is at " in plot.reading
    svg = svg_of(partial(score_by_parameters.draw, plot.data), Look())
    for text in ("rank 64", "full fine-tuning", "room for a bit an episode"):
        assert text in svg


def test_target_modules_are_told_apart() -> None:
    points = score_by_parameters.data(worlds.experiment(placed(0.8, failures=0.0)))[0].data.points
    assert points["targets"].tolist() == ["all-linear", "attention", "mlp"]
    scores = points.set_index("targets")["score"]
    assert scores["attention"] == pytest.approx(BASE + 0.8 * GAIN, abs=0.04)
    assert scores["mlp"] == pytest.approx(BASE + GAIN, abs=0.04)


def test_one_seed_has_no_interval_and_says_so() -> None:
    plot = score_by_parameters.data(worlds.experiment(by_rank(seeds=1, failures=0.0)))[0]
    assert plot.data.points["low"].isna().all()
    assert "one seed, without interval" in plot.reading


def test_an_interval_ends_where_a_share_does() -> None:
    e = by_rank(gain=0.69, seeds=2, failures=0.0).draw(np.random.default_rng(0), curves=True)
    assert score_by_parameters.sizes(e, e.lora)["high"].max() == 1.0


def test_unknown_or_equal_sizes_have_no_plot() -> None:
    sweep = [{"rank": rank, "lr": lr, "score": 0.5} for rank in (1, 8) for lr in (1e-4, 1e-3)]
    assert score_by_parameters.data(made(sweep)) == []
    assert score_by_parameters.data(made([{**trial, "parameters": 7680} for trial in sweep])) == []


def test_runs_of_another_experiment_are_left_out_and_that_is_said() -> None:
    sweep = [
        {"rank": rank, "lr": lr, "score": 0.5, "parameters": 7680 * rank}
        for rank in (1, 8)
        for lr in (1e-4, 1e-3)
    ]
    steps = [{"number": number, "step": 32, "episodes": 4096} for number in range(5)]
    other = {"rank": 64, "score": 0.9, "parameters": 491_520, "context": "another"}
    plot = score_by_parameters.data(made([*sweep, other], steps))[0]
    assert plot.data.points["rank"].tolist() == [1, 8]
    assert plot.reading.endswith(" 1 run of 5 differs in other settings and is left out.")
