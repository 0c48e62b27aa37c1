from __future__ import annotations

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from analysis.stats.rates import split_rates


def points(*rows: tuple[float, float, bool]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["lr", "score", "finished"])


def test_a_basin_has_both_walls() -> None:
    seen = points(
        (1e-5, 0.31, True),
        (1e-4, 0.6, True),
        (3e-4, 0.9, True),
        (1e-3, 0.88, True),
        (3e-3, 0.5, True),
    )
    found = split_rates(seen, 0.3, "maximize")
    assert (found.too_low, found.good, found.too_high) == ((1e-5, 1e-4), (3e-4, 1e-3), (3e-3,))
    assert found.best == 3e-4


def test_a_basin_for_a_metric_where_lower_is_better() -> None:
    found = split_rates(
        points((1e-4, 0.9, True), (1e-3, 0.2, True), (1e-2, 1.5, True)), 1.0, "minimize"
    )
    assert (found.too_low, found.good, found.too_high) == ((1e-4,), (1e-3,), (1e-2,))


def test_a_pruned_trial_is_evidence_against_its_learning_rate_only() -> None:
    found = split_rates(points((1e-3, 0.9, True), (1e-2, 0.95, False)), 0.3, "maximize")
    assert (found.good, found.too_high) == ((1e-3,), (1e-2,))


def test_a_learning_rate_stands_by_its_best_point() -> None:
    found = split_rates(
        points((1e-3, 0.9, True), (1e-3, 0.4, True), (3e-3, 0.88, True)), 0.3, "maximize"
    )
    assert found.good == (1e-3, 3e-3)


def test_nothing_is_good_when_nothing_rose_above_the_base() -> None:
    found = split_rates(points((1e-5, 0.3, True), (1e-2, 0.1, True)), 0.3, "maximize")
    assert (found.best, found.good, found.too_low, found.too_high) == (None, (), (), ())
    assert found.tested == (1e-5, 1e-2)


@given(
    st.lists(
        st.tuples(st.sampled_from([1e-5, 1e-4, 1e-3, 1e-2]), st.floats(0, 1), st.booleans()),
        min_size=1,
    )
)
def test_a_basin_parts_what_was_tested(rows: list[tuple[float, float, bool]]) -> None:
    found = split_rates(points(*rows), 0.3, "maximize")
    assert found.tested == tuple(sorted({row[0] for row in rows}))
    if found.good:
        assert (*found.too_low, *found.good, *found.too_high) == found.tested
        assert found.best in found.good
