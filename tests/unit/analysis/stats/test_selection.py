"""Scores corrected for selection bias: unbiased, and covered by their intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.stats import selection
from analysis.stats.scores import expected

RNG = np.random.default_rng(5)


def test_held_out_seeds_take_the_winners_curse_away() -> None:
    """Twenty equal cells: the best mean flatters by about two standard errors, the held-out score
    not at all.
    """
    naive, honest, errors, covered = [], [], [], 0
    for _ in range(1500):
        scores = RNG.normal(0, 1, (20, 3))
        found = selection.held_out(scores, np.ones(20, bool), 1.0, 40)
        assert found is not None
        naive.append(scores.mean(1).max())
        honest.append(found.estimate.value)
        errors.append(found.estimate.se)
        covered += found.estimate.interval(0.025)[0] <= 0 <= found.estimate.interval(0.025)[1]
    assert np.mean(naive) > 1.0
    assert abs(np.mean(honest)) < 0.06
    assert covered / 1500 >= 0.94
    assert np.std(honest) == pytest.approx(errors[0], rel=0.07)


def test_held_out_scores_pass_over_gaps_and_cells_that_may_not_win() -> None:
    scores = np.array([[0.9, 0.9, 0.9], [0.8, np.nan, 0.8], [0.5, 0.5, 0.5]])
    found = selection.held_out(scores, np.array([False, True, True]), 0.01, 3)
    assert found is not None
    assert set(found.chosen) == {1}
    assert found.estimate.value == pytest.approx(0.8)
    assert selection.held_out(scores[:, :1], np.ones(3, bool), 0.01, 3) is None


def test_fresh_seeds_stand_by_themselves() -> None:
    found = selection.confirmed([0.8, 0.82, 0.84], 4, 0.0004, 6)
    assert found is not None
    assert found.estimate.value == pytest.approx(0.82)
    assert found.estimate.df == 8
    assert found.how == "3 fresh seeds"
    assert selection.confirmed([0.8], 4, 0.0004, 6) is None


def test_shrinking_errs_less_than_the_means_themselves() -> None:
    error = {"shrunken": 0.0, "plain": 0.0}
    for _ in range(400):
        truth = RNG.normal(0.5, 0.05, 12)
        seen = truth + RNG.normal(0, 0.05, 12)
        error["plain"] += float(((seen - truth) ** 2).sum())
        error["shrunken"] += float(
            ((np.array(selection.shrunken(seen.tolist(), 0.05**2)) - truth) ** 2).sum()
        )
    assert error["shrunken"] < 0.7 * error["plain"]
    assert selection.shrunken([0.1, 0.9], 0.01) == [0.1, 0.9]


def sweep(scores: list[list[float]], fresh: dict[int, list[float]] | None = None) -> pd.DataFrame:
    """A table of runs: a list of scores by seed per configuration, and those of fresh seeds."""
    rows = [(c, s, score, False) for c, row in enumerate(scores) for s, score in enumerate(row)]
    rows += [
        (c, 100 + s, score, True) for c, row in (fresh or {}).items() for s, score in enumerate(row)
    ]
    return pd.DataFrame(rows, columns=["configuration", "seed", "score", "confirm"]).assign(
        full=False
    )


def test_a_winner_is_scored_by_the_seeds_that_did_not_choose_it() -> None:
    found = expected(
        sweep([[0.9, 0.6, 0.75], [0.7, 0.7, 0.7], [0.1, 0.2, 0.1]]), 0.0, maximize=True
    )
    assert found is not None
    # Without its seed of 0.9 configuration 0 would not have been chosen: the second's 0.7 stands
    # for that seed.
    assert found.estimate.value == pytest.approx((0.7 + 0.6 + 0.75) / 3)
    assert found.how == "3 seeds, each scoring what the others choose"


def test_what_is_expected_is_the_metrics_better_end() -> None:
    found = expected(sweep([[0.9, np.nan], [0.5, 0.6], [0.2, 0.3]]), 1.0, maximize=False)
    assert found is not None
    assert found.estimate.value == pytest.approx(0.25)
    assert expected(sweep([[np.nan, 0.5]]), 0.0, maximize=True) is None
    assert expected(sweep([[0.4], [0.6]]), 0.0, maximize=True) is None
