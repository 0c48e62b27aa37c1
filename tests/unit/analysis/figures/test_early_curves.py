"""Early curves over ranks: the claim's own measure, and right on sweeps with a known truth."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.claims import judge
from analysis.claims.curves import Early
from analysis.claims.evidence import gather
from analysis.figures import early_curves
from tests.unit.analysis import worlds
from tests.unit.analysis.simulation import by_rank


def test_ranks_that_learn_alike_are_the_same_early_on() -> None:
    plot = early_curves.data(worlds.experiment(by_rank(failures=0.0)))[0]
    curves = plot.data
    assert curves.curves["rank"].unique().tolist() == [1, 4, 16, 64]
    assert "Every rank's interval is within ±" in plot.reading
    assert "the early curves are the same" in plot.reading
    assert (curves.leads["low"] < curves.leads["lead"]).all()
    assert curves.leads["lead"].sum() == pytest.approx(0.0, abs=1e-9)


def test_a_slow_rank_is_behind_by_what_the_simulation_slows_it() -> None:
    plot = early_curves.data(worlds.experiment(by_rank({1: {"slow": 2.0}}, failures=0.0)))[0]
    leads = plot.data.leads.set_index("rank")
    assert leads["high"][1] < -plot.data.margin
    assert "Rank 1" in plot.reading
    assert "beyond ±" in plot.reading
    assert "not the same" in plot.reading
    assert plot.reading.endswith("and rank 1 the lowest.")


def test_the_measure_is_the_claims_own() -> None:
    experiment = worlds.experiment(by_rank({64: {"slow": 1.3}}, failures=0.0))
    e = gather(experiment.tables.runs, experiment.tables.steps)
    claim = next(verdict for verdict in judge(e) if verdict.id == "6")
    leads = early_curves.data(experiment)[0].data.leads
    furthest = leads.loc[leads["lead"].abs().idxmax()]
    assert claim.effect == furthest["lead"]
    assert claim.interval == (furthest["low"], furthest["high"])


def test_curves_are_the_means_over_what_the_ranks_share() -> None:
    experiment = worlds.experiment(by_rank(failures=0.0))
    curves = early_curves.data(experiment)[0].data
    steps, runs = experiment.tables.steps, experiment.tables.runs
    shared = runs[(runs["rank"] == 4) & runs["status"].eq("COMPLETE")]
    first = steps[(steps["step"] == 1) & steps["run_dir"].isin(shared["run_dir"])].set_index(
        "run_dir"
    )["reward"]
    drawn = float(curves.curves.query("rank == 4 and step == 1")["reward"].iloc[0])
    assert first.min() < drawn < first.max()
    smooth = curves.curves.query("rank == 4")
    assert smooth["smooth"].iloc[1] == pytest.approx(smooth["reward"].iloc[:3].mean())
    assert smooth["smooth"].iloc[[0, -1]].isna().all()


def test_one_rate_and_seed_has_no_interval() -> None:
    early = Early(
        curves=np.tile(np.linspace(0, 1, 8), (2, 1, 1)),
        scores=np.array([[0.4], [0.3]]),
        ranks=[1, 8],
        rise=0.3,
        steps=3,
        runs=2,
        seeds=1,
    )
    curves = early_curves.by_rank(early)
    assert curves.leads["lead"].tolist() == pytest.approx([0.1, -0.1])
    assert curves.leads["low"].isna().all()


def test_what_does_not_learn_has_no_early_part() -> None:
    assert early_curves.data(worlds.experiment(by_rank(gain=0.0))) == []
