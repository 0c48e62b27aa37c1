from __future__ import annotations

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.experiment import Experiment
from analysis.stats import ranking
from tests.unit.analysis.synthetic import LR

METRIC = "eval/accuracy"


def table(rows: list[tuple[int, int, str, float]]) -> pd.DataFrame:
    """Trials as (configuration, seed, status, score); a trial that did not complete has only its
    last score.
    """
    frame = pd.DataFrame(rows, columns=["configuration", "seed", "status", "score"])
    frame["number"] = range(len(frame))
    frame[LR] = 1e-3
    frame[METRIC] = frame["score"].where(frame["status"] == "COMPLETE")
    frame[f"last/{METRIC}"] = frame["score"]
    return frame


def test_wilson_agrees_with_the_published_formula() -> None:
    # Wilson (1927): (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    p, n, z = 466 / 512, 512, 1.959963984540054
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = ranking.wilson(p, n)
    assert found.low == pytest.approx((p + z * z / (2 * n) - half) / (1 + z * z / n))
    assert found.high == pytest.approx((p + z * z / (2 * n) + half) / (1 + z * z / n))


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_stays_within_0_and_1_around_the_share(case: tuple[int, int]) -> None:
    right, problems = case
    found = ranking.wilson(right / problems, problems)
    assert 0 <= found.low <= right / problems + 1e-12
    assert right / problems - 1e-12 <= found.high <= 1


def test_several_seeds_have_a_range_and_one_an_interval_over_problems() -> None:
    assert ranking.spread([0.9, 0.8, 0.85], 512) == ranking.Interval(0.8, 0.9, "range of 3 seeds")
    assert ranking.spread([0.85], 512) == ranking.wilson(0.85, 512)
    assert ranking.spread([0.9], None) is None
    assert ranking.spread([], 512) is None


def test_a_graded_score_is_no_count_of_right_answers() -> None:
    assert ranking.counts_right_answers([466 / 512, 0.0, 1.0], 512)
    assert not ranking.counts_right_answers([0.1234], 512)
    assert not ranking.counts_right_answers([2.0], 512)


def test_the_mean_over_seeds_decides_not_the_luckiest_seed() -> None:
    trials = table(
        [
            (0, 0, "COMPLETE", 0.99),
            (0, 1, "COMPLETE", 0.5),
            (1, 0, "COMPLETE", 0.8),
            (1, 1, "COMPLETE", 0.8),
        ]
    )
    best = ranking.best_configuration(trials, METRIC, "maximize")
    assert best == ranking.Winner(
        1, score=0.8, seeds=2, candidates=2, ties=(), confirmed=False, leader=1
    )


def test_the_better_end_is_the_directions() -> None:
    trials = table([(0, 0, "COMPLETE", 0.1), (1, 0, "COMPLETE", 0.9)])
    up, down = (ranking.best_configuration(trials, METRIC, end) for end in ("maximize", "minimize"))
    assert up is not None
    assert down is not None
    assert (up.configuration, down.configuration) == (1, 0)


@pytest.mark.parametrize("status", ["FAILED", "PRUNED", "RUNNING", "CREATED"])
def test_a_configuration_with_a_seed_not_complete_cannot_win(status: str) -> None:
    rows = [
        (0, 0, "COMPLETE", 0.99),
        (0, 1, status, 0.99),
        (1, 0, "COMPLETE", 0.3),
        (1, 1, "COMPLETE", 0.3),
    ]
    best = ranking.best_configuration(table(rows), METRIC, "maximize")
    assert best is not None
    assert best.configuration == 1


def test_a_seed_that_never_started_counts_as_missing() -> None:
    trials = table([(0, 0, "COMPLETE", 0.99), (1, 0, "COMPLETE", 0.3), (1, 1, "COMPLETE", 0.3)])
    best = ranking.best_configuration(trials, METRIC, "maximize", [0, 1])
    assert best is not None
    assert best.configuration == 1


def test_no_complete_trial_no_winner() -> None:
    assert ranking.best_configuration(table([(0, 0, "FAILED", 0.9)]), METRIC, "maximize") is None
    assert ranking.best_configuration(table([]), METRIC, "maximize") is None


def test_ties_are_named_and_share_a_rank() -> None:
    trials = table([(4, 0, "COMPLETE", 0.5), (2, 0, "COMPLETE", 0.5), (7, 0, "COMPLETE", 0.4)])
    best = ranking.best_configuration(trials, METRIC, "maximize")
    assert best is not None
    assert (best.configuration, best.ties) == (2, (4,))
    ranked = ranking.by_configuration(trials, METRIC, "maximize", [0])
    assert ranked["rank"].tolist() == [1, 1, 3]


def test_one_fresh_seed_is_too_few_to_decide() -> None:
    trials = table([(0, 0, "COMPLETE", 0.5), (1, 0, "COMPLETE", 0.6), (1, 100, "COMPLETE", 0.1)])
    trials["confirm"] = [False, False, True]
    best = ranking.best_configuration(trials, METRIC, "maximize", [0])
    assert best is not None
    assert (best.configuration, best.score, best.confirmed) == (1, 0.6, False)


def test_fresh_seeds_rank_the_leaders_that_were_run_on_all_of_them() -> None:
    swept = [(c, 0, "COMPLETE", score) for c, score in enumerate((0.9, 0.8, 0.7, 0.6))]
    fresh = [
        (c, seed, "COMPLETE", score) for c, score in enumerate((0.5, 0.65)) for seed in (100, 101)
    ]
    trials = table([*swept, *fresh, (2, 100, "COMPLETE", 0.99), (2, 101, "FAILED", 0.99)])
    trials["confirm"] = trials["seed"] >= 100
    best = ranking.best_configuration(trials, METRIC, "maximize")
    assert best == ranking.Winner(
        1, score=0.65, seeds=2, candidates=4, ties=(), confirmed=True, leader=0
    )
    ranked = ranking.by_configuration(trials, METRIC, "maximize", [0])
    assert ranked[["configuration", "rank"]].values.tolist() == [[1, 1], [0, 2], [2, 3], [3, 4]]


def test_a_seed_run_again_counts_once_the_later_run() -> None:
    trials = table([(0, 0, "COMPLETE", 0.2), (0, 0, "COMPLETE", 0.6)])
    ranked = ranking.by_configuration(trials, METRIC, "maximize", [0])
    assert (ranked.iloc[0]["n"], ranked.iloc[0]["mean"]) == (1, 0.6)


def test_summary_of_the_example(experiment: Experiment) -> None:
    ranked = experiment.configurations
    assert ranked["configuration"].tolist() == [2, 1, 3, 0, 4, 5]
    assert ranked["rank"].dropna().tolist() == [1, 2, 3, 4]
    first = ranked.iloc[0]
    assert first["mean"] == pytest.approx(0.91, abs=1e-3)
    assert (first["low"], first["high"]) == pytest.approx((0.900, 0.920), abs=1e-3)
    assert ranked.iloc[4]["statuses"] == "1 complete, 1 running"
