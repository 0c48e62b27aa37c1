from __future__ import annotations

from pathlib import Path

import pytest

from analysis.experiment import Experiment
from analysis.report.tables import bars
from tests.unit.analysis.synthetic import BASE, Sweep, Trial, params, write_sweep


def test_a_bar_stands_where_its_numbers_are(experiment: Experiment) -> None:
    table, found = experiment.configurations, bars(experiment)
    assert len(found) == len(table)
    first, last = found[0], found[3]
    assert first is not None
    assert last is not None
    assert first.low is not None
    assert first.high is not None
    assert 0 < last.mean < first.low < first.mean < first.high <= 100
    # The axis is linear: three known points give the fourth.
    scale = (first.mean - last.mean) / (table["mean"].iloc[0] - table["mean"].iloc[3])
    assert first.base == pytest.approx(last.mean + scale * (BASE - table["mean"].iloc[3]), abs=0.2)


def test_no_score_no_bar(experiment: Experiment) -> None:
    scored = experiment.configurations["mean"].notna()
    assert [bar is not None for bar in bars(experiment)] == scored.tolist()
    assert not scored.all(), "the example has a configuration without a score"


def test_without_any_spread_there_is_no_axis(tmp_path: Path) -> None:
    sweep = Sweep([Trial(0, 0, params(8, 1e-3), BASE)], metric="reward", seeds=[0])
    assert bars(Experiment.open(write_sweep(tmp_path, sweep))) == [None]
