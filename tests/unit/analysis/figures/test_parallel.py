"""Parallel coordinates: where a trial is on each axis, and what the best have in common."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
import pytest

from analysis.figures import parallel
from analysis.figures.parallel import scale
from analysis.figures.theme import Look, render
from analysis.labels import ALPHA, LR, RANK
from tests.unit.analysis.figures.made import made


def trials(count: int = 20) -> list[dict[str, Any]]:
    """Rates from 1e-5 to 1e-2, the more the better; ranks in turn, with rank 8 a little better."""
    rates = [10 ** (-5 + 3 * place / (count - 1)) for place in range(count)]
    return [
        {
            "rank": (1, 8)[place % 2],
            "lr": lr,
            "score": 0.3 + 0.5 * place / count + 0.1 * (place % 2),
        }
        for place, lr in enumerate(rates)
    ]


def test_the_reading_says_what_the_best_have_in_common() -> None:
    plot = parallel.data(made(trials()))[0]
    assert (
        plot.reading
        == "The best 3 of 20 trials have rank 8 (of 2) and learning rate 2.3e-3 to 1e-2 "
        "(of 1e-5 to 1e-2)."
    )


def test_the_best_configuration_is_last_and_what_did_not_complete_first() -> None:
    rows = [*trials(), {"rank": 1, "lr": 0.1, "score": None, "status": "FAILED"}]
    found: parallel.Lines = parallel.data(made(rows))[0].data
    assert found.keys == (RANK, LR)
    assert found.trials["best"].tolist() == [False] * 20 + [True]
    assert pd.isna(found.trials["score"].iloc[0])
    assert found.trials["score"].iloc[-1] == found.trials["score"].max()


def test_of_a_loss_the_lowest_are_the_best() -> None:
    rows = [{**row, "score": -row["score"]} for row in trials()]
    plot = parallel.data(made(rows, metric="loss", maximize=False))[0]
    assert "rank 8 (of 2)" in plot.reading
    assert plot.data.trials["score"].iloc[-1] == plot.data.trials["score"].min()


def test_trials_with_equal_scores_are_the_best_together() -> None:
    rows = [{**row, "score": 0.9 if row["rank"] == 8 else 0.5} for row in trials()]
    assert parallel.data(made(rows))[0].reading.startswith(
        "The best 10 of 20 trials have rank 8 (of 2)"
    )
    rows = [{**row, "score": 0.5} for row in trials()]
    assert parallel.data(made(rows))[0].reading == "All 20 trials have the same score."


def test_full_fine_tuning_has_no_place_on_alphas_axis() -> None:
    rows = [
        {"rank": rank, "alpha": alpha, "lr": 1e-3, "score": 0.5}
        for rank in (0, 8)
        for alpha in (16.0, 32.0)
    ]
    found: parallel.Lines = parallel.data(made(rows))[0].data
    assert found.trials[found.trials[RANK] == 0][ALPHA].isna().all()
    assert found.trials[found.trials[RANK] == 8][ALPHA].notna().all()


def test_few_values_are_names_at_equal_distances_and_many_a_log_scale() -> None:
    few = scale(RANK, pd.Series([1, 8, 64]))
    assert few.ticks == [(0.0, "1"), (0.5, "8"), (1.0, "64")]
    assert few.places.tolist() == pytest.approx([0.0, 0.5, 1.0])
    many = scale(LR, pd.Series([10.0**-place for place in range(1, 11)]))
    assert many.places.tolist() == pytest.approx([1 - place / 9 for place in range(10)])
    assert [name for _, name in many.ticks][::4] == ["1e-10", "1e-1"]


def test_trials_at_one_name_run_side_by_side() -> None:
    places = scale(RANK, pd.Series([1, 1, 8])).places
    assert places[0] < 0.0 < places[1] < 0.2
    assert places[2] == 1.0


def test_one_swept_key_or_one_score_is_no_figure() -> None:
    assert parallel.data(made([{**row, "rank": 8} for row in trials()])) == []
    assert parallel.data(made(trials()[:1])) == []


@pytest.mark.parametrize("look", [Look(), Look(dark=True, narrow=True)], ids=str)
def test_draws_the_axes_and_their_names(look: Look) -> None:
    rows = [*trials(), {"rank": 1, "lr": 0.1, "score": None, "status": "PRUNED"}]
    svg = render(partial(parallel.draw, parallel.data(made(rows))[0].data), look).decode()
    for text in ("rank", "learning", "score", "the best configuration", "did not complete"):
        assert text in svg


def test_hundreds_of_trials_stay_small() -> None:
    plot = parallel.data(made(trials(500)))[0]
    assert len(render(partial(parallel.draw, plot.data), Look())) < 150_000
