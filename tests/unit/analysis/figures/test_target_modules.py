"""Target modules: which arms are compared, and by how much they differ."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest

from analysis.figures import target_modules
from analysis.figures.drawing.theme import Look
from analysis.figures.target_modules import EQUAL_PARAMETERS, EQUAL_RANK
from tests.unit.analysis.figures.made import made, svg_of

ARMS = {
    ("all-linear", 8): (61_440, 0.90),
    ("mlp", 8): (36_864, 0.88),
    ("attention", 12): (36_864, 0.70),
}


def trials(seeds: int = 3, sign: float = 1.0, **changes: Any) -> list[dict[str, Any]]:
    """Three learning rates an arm, the middle one the best; seeds 0.01 apart around the arm's
    score.
    """
    return [
        {
            "targets": targets,
            "rank": rank,
            "parameters": size,
            "lr": lr,
            "seed": seed,
            **changes,
            "score": sign * (top - drop + 0.01 * (seed - (seeds - 1) / 2)),
            "base": sign * 0.3,
        }
        for ((targets, rank), (size, top)), (lr, drop), seed in itertools.product(
            ARMS.items(), ((1e-4, 0.3), (1e-3, 0.0), (1e-2, 0.4)), range(seeds)
        )
    ]


def test_only_arms_of_equal_rank_or_as_many_parameters_are_compared() -> None:
    found: target_modules.PlacementData = target_modules.data(made(trials()))[0].data
    who = {panel: set(rows["targets"]) for panel, rows in found.points.groupby("panel")}
    assert who == {EQUAL_RANK: {"all-linear", "mlp"}, EQUAL_PARAMETERS: {"mlp", "attention"}}
    rank, parameters = found.gaps.to_dict("records")
    assert (rank["panel"], rank["first"], rank["second"]) == (EQUAL_RANK, "all-linear", "mlp")
    assert (parameters["panel"], parameters["first"], parameters["second"]) == (
        EQUAL_PARAMETERS,
        "attention",
        "mlp",
    )
    assert rank["gap"] == pytest.approx(0.02, abs=0.02)
    assert rank["low"] < 0.02 < rank["high"]
    assert parameters["gap"] == pytest.approx(-0.18, abs=0.02)
    assert parameters["high"] < 0


def test_a_score_is_that_of_the_best_learning_rate_free_of_the_choice() -> None:
    found: target_modules.PlacementData = target_modules.data(made(trials()))[0].data
    mlp = found.points[
        (found.points["targets"] == "mlp") & (found.points["panel"] == EQUAL_RANK)
    ].iloc[0]
    assert mlp["low"] < 0.88 < mlp["high"]
    assert mlp["score"] == pytest.approx(0.88, abs=0.015)


def test_the_reading_names_gaps_intervals_and_seeds() -> None:
    reading = target_modules.data(made(trials()))[0].reading
    assert "At equal rank all-linear is +0.0" in reading
    assert "not told apart" in reading.split("At equal parameters")[0]
    assert "At equal parameters mlp is +0.1" in reading
    assert "95% intervals over 3 seeds" in reading


def test_of_a_loss_the_gap_is_in_the_loss() -> None:
    losses = made(trials(sign=-1.0), metric="loss", maximize=False)
    plot = target_modules.data(losses)[0]
    assert plot.data.gaps.set_index("panel")["gap"][EQUAL_PARAMETERS] == pytest.approx(
        0.18, abs=0.02
    )
    assert "At equal parameters mlp is -0.1" in plot.reading


def test_one_seed_has_no_interval() -> None:
    plot = target_modules.data(made(trials(seeds=1)))[0]
    assert plot.data.points["low"].isna().all()
    assert plot.data.gaps.set_index("panel")["gap"][EQUAL_RANK] == pytest.approx(0.02)
    assert "with one seed, without interval" in plot.reading


def test_arms_that_differ_in_more_are_not_compared() -> None:
    rows = trials()
    for row in rows:
        row["alpha"] = {"all-linear": 8.0, "mlp": 16.0, "attention": 32.0}[row["targets"]]
    assert target_modules.data(made(rows)) == []
    assert target_modules.data(made([row for row in trials() if row["targets"] == "mlp"])) == []


def test_runs_of_another_experiment_have_no_part() -> None:
    others = [{**row, "context": "two", "score": 0.1} for row in trials()[:5]]
    plot = target_modules.data(made([*trials(), *others]))[0]
    assert (
        plot.data.gaps["gap"].tolist()
        == target_modules.data(made(trials()))[0].data.gaps["gap"].tolist()
    )
    assert plot.reading.endswith("5 runs of 32 differ in other settings and are left out.")


@pytest.mark.parametrize("look", [Look(), Look(dark=True, narrow=True)], ids=str)
def test_draws_a_panel_for_each_kind_of_pair(look: Look) -> None:
    plot = target_modules.data(made(trials()))[0]
    svg = svg_of(partial(target_modules.draw, plot.data), look)
    for text in ("at equal rank", "at equal parameters", "37k", "all-linear", "attention"):
        assert text in svg
