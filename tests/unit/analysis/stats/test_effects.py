"""Tests against margins: their values by other ways, and their error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.weightstats import ttost_ind

from analysis.stats import effects
from analysis.stats.effects import (
    Estimate,
    average,
    better,
    beyond,
    combined,
    difference,
    every,
    no_worse,
    within,
)

RNG = np.random.default_rng(3)


def estimate(scores: np.ndarray) -> Estimate:
    return Estimate(
        float(scores.mean()), float(scores.std(ddof=1) / np.sqrt(len(scores))), len(scores) - 1.0
    )


def test_a_difference_is_welchs() -> None:
    a, b = RNG.normal(1, 1, 7), RNG.normal(0, 3, 4)
    found = difference(estimate(a), estimate(b))
    theirs = scipy_stats.ttest_ind(a, b, equal_var=False)
    assert found.df == pytest.approx(theirs.df)
    assert found.below(0) + found.above(0) == pytest.approx(1)
    assert 2 * min(found.below(0), found.above(0)) == pytest.approx(theirs.pvalue)
    assert found.interval() == pytest.approx(tuple(theirs.confidence_interval(0.90)))


def test_an_equivalence_is_statsmodels_tost() -> None:
    a, b = RNG.normal(0, 1, 9), RNG.normal(0.1, 1, 9)
    ours = within(difference(estimate(a), estimate(b)), -0.8, 0.8).holds
    assert ours == pytest.approx(ttost_ind(a, b, -0.8, 0.8, usevar="unequal")[0])


def test_equivalence_at_its_margin_is_found_in_5_of_100() -> None:
    found = 0
    for _ in range(2000):
        a, b = RNG.normal(0, 1, 8), RNG.normal(1.5, 1, 8)
        found += within(difference(estimate(a), estimate(b)), -1.5, 1.5).holds <= 0.05
    assert 0.035 <= found / 2000 <= 0.065


def test_both_sides_of_each_test() -> None:
    clear = Estimate(1.0, 0.1, 20)
    assert no_worse(clear.shifted(0.5)).holds < 0.001 < 0.999 < no_worse(clear.shifted(0.5)).fails
    assert better(clear, clear.scaled(-1).shifted(0.5)).holds < 0.001
    assert better(Estimate(0.0, 0.1, 20), Estimate(0.5, 0.1, 20)).fails < 0.001
    assert within(clear, -0.5, 0.5).fails < 0.01
    assert within(Estimate(0.0, 0.1, 20), -0.5, 0.5).holds < 0.001
    assert (
        beyond(Estimate(-0.5, 0.05, 20), -0.25).holds
        < 0.001
        < 0.999
        < beyond(Estimate(-0.5, 0.05, 20), -0.25).fails
    )


def test_all_of_several_must_hold_and_one_that_fails_is_enough() -> None:
    good, bad = no_worse(Estimate(0.5, 0.1, 20)), no_worse(Estimate(-1.5, 0.1, 20))
    assert every([good, good]).holds == good.holds
    assert every([good, bad]).holds == bad.holds
    assert every([good, bad]).fails == pytest.approx(2 * bad.fails)
    assert "intersection-union" in every([good, bad]).test


def test_sums_weigh_their_parts() -> None:
    parts = [Estimate(1.0, 0.2, 5), Estimate(3.0, 0.1, 8)]
    assert average(parts).value == 2.0
    assert average(parts).se == pytest.approx(math.hypot(0.2, 0.1) / 2)
    assert combined([(2.0, parts[0])]).se == pytest.approx(0.4)
    assert parts[0].scaled(-2).value == -2
    assert parts[0].shifted(1).value == 2


def test_no_error_of_few_seeds_excludes_nothing_and_arithmetic_everything() -> None:
    lucky, known = Estimate(1.0, 0.0, 2), Estimate(1.0, 0.0, math.inf)
    assert (lucky.above(0), lucky.below(2)) == (1.0, 1.0)
    assert (known.above(0), known.above(2), known.below(2)) == (0.0, 1.0, 0.0)


def test_holm() -> None:
    assert effects.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert effects.holm([]) == []


def test_seeds_needed_would_do() -> None:
    now = Estimate(0.03, 0.02, 4)
    wanted = effects.seeds_needed(now, 0.0, 3)
    assert wanted is not None
    assert wanted > 3
    then = Estimate(0.03, 0.02 * math.sqrt(3 / wanted), 100)
    assert then.value / then.se > 1.66 + 0.84
    assert effects.seeds_needed(Estimate(0.0, 0.02, 4), 0.0, 3) is None
