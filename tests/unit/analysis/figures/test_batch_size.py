"""Batch size: what going to the largest costs each rank and full fine-tuning."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest

from analysis.figures import batch_size
from analysis.figures.drawing.theme import Look
from tests.unit.analysis.figures.made import made, svg_of

COSTS = {0: 0.0, 1: 0.2, 16: 0.1}


def trials(seeds: int = 3, sign: float = 1.0) -> list[dict[str, Any]]:
    """Three learning rates, the middle one at 0.9 less what the batch costs; seeds 0.01 apart."""
    return [
        {
            "rank": rank,
            "batch_size": size,
            "lr": lr,
            "seed": seed,
            "base": sign * 0.3,
            "score": sign * (0.9 - cost * share - drop + 0.01 * (seed - (seeds - 1) / 2)),
        }
        for (rank, cost), (size, share), (lr, drop), seed in itertools.product(
            COSTS.items(),
            ((128, 0.0), (512, 0.5), (2048, 1.0)),
            ((1e-4, 0.3), (1e-3, 0.0), (1e-2, 0.4)),
            range(seeds),
        )
    ]


def test_costs_are_from_the_smallest_to_the_largest_batch_at_the_best_rates() -> None:
    plot = batch_size.data(made(trials()))[0]
    found: batch_size.BatchData = plot.data
    assert found.costs.set_index("rank")["cost"].to_dict() == pytest.approx(COSTS, abs=0.015)
    assert (found.costs["low"] < found.costs["cost"]).all()
    levels = found.points[found.points["rank"] == 1].set_index("batch")["score"]
    assert levels.to_dict() == pytest.approx({128: 0.9, 512: 0.8, 2048: 0.7}, abs=0.02)
    assert "from 128 to 2048 sequences an update costs full fine-tuning" in plot.reading
    assert "rank 1 0.2" in plot.reading
    assert plot.reading.endswith(
        "(each at the best of its 3 learning rates; 95% intervals over 3 seeds). All ran 32 steps."
    )


def test_what_a_batch_costs_of_a_loss_is_positive_too() -> None:
    found: batch_size.BatchData = batch_size.data(
        made(trials(sign=-1.0), metric="loss", maximize=False)
    )[0].data
    assert found.costs.set_index("rank")["cost"].to_dict() == pytest.approx(COSTS, abs=0.015)
    assert (found.points["score"] < 0).all()


def test_one_seed_has_costs_without_intervals() -> None:
    plot = batch_size.data(made(trials(seeds=1)))[0]
    assert plot.data.costs.set_index("rank")["cost"].to_dict() == pytest.approx(COSTS)
    assert plot.data.costs["low"].isna().all()
    assert "with one seed, without interval" in plot.reading


def test_lora_alone_is_shown_and_lengths_that_differ_are_said() -> None:
    rows = [row for row in trials() if row["rank"]]
    for row in rows:
        row["budget"] = f"{4096 // row['batch_size']} steps"
    plot = batch_size.data(made(rows))[0]
    assert set(plot.data.points["rank"]) == {1, 16}
    assert "Lengths differ (2 steps, 32 steps and 8 steps)" in plot.reading


def test_one_batch_size_is_no_figure() -> None:
    assert batch_size.data(made([row for row in trials() if row["batch_size"] == 128])) == []


@pytest.mark.parametrize("look", [Look(), Look(dark=True, narrow=True)], ids=str)
def test_draws_a_line_for_each_rank(look: Look) -> None:
    svg = svg_of(partial(batch_size.draw, batch_size.data(made(trials()))[0].data), look)
    for text in ("full fine-tuning", "rank 1", "rank 16", "2048", "base"):
        assert text in svg
