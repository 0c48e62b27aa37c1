"""The claims' verdicts: right on what is known, silent on what is not."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from analysis.claims import CLAIMS, judge, judge_tables
from analysis.claims.arm import Arm
from analysis.claims.claim import FAILS, HOLDS, UNKNOWN
from analysis.claims.evidence import ALL, Evidence, contexts, gather
from analysis.data.tables import Tables, load
from harness.records.run_dir import Status
from tests.benchmarks import bench_claims
from tests.unit.analysis.simulation import (
    BASE,
    CASES,
    GAIN,
    Case,
    batched,
    by_rank,
    by_scale,
    placed,
)
from tests.unit.analysis.synthetic import Sweep, Trial, params, write_sweep

IDS = [f"{case.claim}: {case.name}" for case in CASES]


def drawn(seeds: int = 3, seed: int = 0) -> Evidence:
    """A sweep over ranks, as LoRA Without Regret would have it."""
    return by_rank(seeds=seeds, failures=0.0).draw(np.random.default_rng(seed), curves=True)


def only(found: Evidence, where: np.ndarray) -> Evidence:
    """Some of the runs of a sweep."""
    columns = {
        field.name: getattr(found, field.name)[where]
        for field in fields(found)
        if isinstance(getattr(found, field.name), np.ndarray)
        and len(getattr(found, field.name)) == len(where)
    }
    return replace(found, **columns)


# Of few sweeps a share may miss its bound by chance: three standard deviations are allowed then.
@pytest.mark.parametrize("sweeps", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_claim_that_is_false_holds_in_at_most_5_of_100_sweeps_and_a_true_one_in_80(
    case: Case, sweeps: int
) -> None:
    shares = case.shares(sweeps)
    exact = sweeps >= 1000
    rarely = 0.05 if exact else 0.05 + 3 * (0.05 * 0.95 / sweeps) ** 0.5
    mostly = 0.8 if exact else 0.8 - 3 * (0.8 * 0.2 / sweeps) ** 0.5
    if case.true:
        assert shares[HOLDS] >= mostly
        assert shares[FAILS] <= rarely
    else:
        assert shares[HOLDS] <= rarely


def test_every_claim_has_a_false_and_a_reported_case() -> None:
    # Claim 7 is arithmetic on counted parameters.
    for claim in set(CLAIMS) - {"7"}:
        assert [case for case in CASES if case.claim == claim and not case.true]
        assert [case for case in CASES if case.claim == claim and case.reported]


def test_early_curves_are_judged_beside_longer_runs() -> None:
    found = drawn()
    padded = replace(found, curves=np.pad(found.curves, ((0, 0), (0, 7)), constant_values=np.nan))
    alone, beside = CLAIMS["6"].verdict(found), CLAIMS["6"].verdict(padded)
    assert alone.verdict == HOLDS
    assert beside == alone


def test_nothing_is_told_without_runs() -> None:
    for verdict in judge(None):
        assert (verdict.verdict, verdict.effect, verdict.n, verdict.p) == (UNKNOWN, None, 0, None)
        assert verdict.settle.startswith("python -m harness.sweep recipes/lora_without_regret/")


def test_one_seed_tells_nothing_about_scores_and_rates() -> None:
    verdicts = judge(drawn(seeds=1))
    assert {verdict.verdict for verdict in verdicts if verdict.id != "7"} == {UNKNOWN}


def test_without_full_fine_tuning_nothing_is_said_against_it() -> None:
    whole = drawn()
    verdicts = {verdict.id: verdict for verdict in judge(only(whole, whole.rank > 0))}
    assert {verdicts[claim].verdict for claim in ("1a", "1b", "3", "5")} == {UNKNOWN}
    assert verdicts["2a"].verdict == HOLDS


def test_all_claims_of_a_sweep_as_published_hold() -> None:
    world = np.random.default_rng(0)
    by_id = {
        verdict.id: verdict.verdict
        for verdict in judge(by_rank(failures=0.0).draw(world, curves=True))
    }
    assert [
        claim for claim in ("1a", "1b", "2a", "3", "6", "8", "9") if by_id[claim] != HOLDS
    ] == []
    assert CLAIMS["2c"].verdict(by_scale(-0.5).draw(world)).verdict == HOLDS
    assert CLAIMS["4a"].verdict(placed(0.9).draw(world)).verdict == HOLDS
    assert CLAIMS["5"].verdict(batched({0: 0.0, 1: 0.2, 64: 0.2}).draw(world)).verdict == HOLDS


def test_a_verdict_reads_as_its_numbers() -> None:
    verdict = CLAIMS["3"].verdict(drawn())
    assert verdict.effect is not None
    assert verdict.interval is not None
    assert f"{10**verdict.effect:.1f} times" in verdict.reading
    assert verdict.interval[0] < verdict.effect < verdict.interval[1]
    assert verdict.n == 96  # full fine-tuning, 4, 16 and 64: 8 rates and 3 seeds each
    assert verdict.margin == "5x to 20x"


def test_a_best_rate_at_the_end_of_the_tested_ones_is_no_best_rate() -> None:
    whole = drawn()
    full = whole.rank == 0
    best = 1e-3 / 9.8
    cut = only(whole, ~full | (whole.lr < best / 1.5))
    verdicts = {verdict.id: verdict for verdict in judge(cut)}
    assert verdicts["1a"].verdict == UNKNOWN
    assert "is the highest tested" in verdicts["1a"].reading
    assert verdicts["1a"].settle.startswith("add learning rates from")
    assert verdicts["3"].verdict == UNKNOWN
    assert "further" in verdicts["3"].reading


def test_a_grid_that_is_too_coarse_for_full_fine_tuning_is_said() -> None:
    wide = by_rank({0: {"width": 0.2}}, failures=0.0).draw(np.random.default_rng(0))
    verdict = CLAIMS["1a"].verdict(wide)
    assert verdict.verdict == UNKNOWN
    assert "steps of the tested rates wide" in verdict.reading
    assert verdict.settle.startswith("add learning rates between")


def confirmed(found: Evidence, scores: dict[int, float]) -> Arm:
    """Rank 1's arm, with three fresh seeds at its best rate (0) and at rates so many places from
    it.
    """
    one = found.rank == 1
    chosen = found.arm(one)
    assert chosen is not None
    parts = {
        field.name: [getattr(found, field.name)]
        for field in fields(found)
        if isinstance(getattr(found, field.name), np.ndarray)
        and len(getattr(found, field.name)) == len(one)
    }
    for place, score in scores.items():
        again = one & np.isclose(np.log10(found.lr), chosen.log_lr[chosen.top + place])
        changed = {"confirm": True, "score": score, "seed": 100 + found.seed[again]}
        for name, columns in parts.items():
            columns.append(
                np.full_like(columns[0][again], changed[name])
                if name in changed
                else columns[0][again]
            )
    joined: dict[str, Any] = {name: np.concatenate(columns) for name, columns in parts.items()}
    arm = replace(found, **joined).arm(joined["rank"] == 1)
    assert arm is not None
    assert arm.peak is not None
    return arm


def test_fresh_seeds_count_in_place_of_those_that_chose() -> None:
    arm = confirmed(drawn(), {0: BASE + 0.5 * GAIN})
    assert arm.peak is not None
    assert arm.peak.value == pytest.approx(BASE + 0.5 * GAIN + arm.headroom)
    assert arm.seeds == 3


def test_fresh_seeds_say_which_rate_is_an_arms_best() -> None:
    arm = confirmed(drawn(), {0: BASE + 0.5 * GAIN, 1: BASE + 0.9 * GAIN})
    assert arm.peak is not None
    assert arm.peak.value == pytest.approx(BASE + 0.9 * GAIN + arm.headroom)


def test_diverged_and_pruned_runs_tell_against_their_rate_and_are_never_the_best() -> None:
    whole = drawn()
    worse = whole.lr > 1e-2
    spoilt = replace(whole, bad=whole.bad | worse, score=np.where(worse, np.nan, whole.score))
    arm = spoilt.arm(spoilt.rank == 16)
    assert arm is not None
    assert arm.bad[arm.log_lr > -2].all()
    assert arm.log_lr[arm.top] < -2


def test_p_values_are_adjusted_for_there_being_several() -> None:
    verdicts = [
        verdict for verdict in judge(drawn()) if verdict.p is not None and verdict.id != "7"
    ]
    assert len(verdicts) > 5
    assert all(
        verdict.p_holm is not None and verdict.p_holm >= (verdict.p or 0.0) for verdict in verdicts
    )


def test_flops_are_arithmetic_on_the_adapters_size() -> None:
    verdict = CLAIMS["7"].verdict(drawn())
    assert verdict.verdict == FAILS
    # Rank 64 of a model this small: 2/3 + 64 * 7680 / 750000.
    assert verdict.effect == pytest.approx(2 / 3 + 64 * 7680 / 750_000)
    small = drawn()
    assert CLAIMS["7"].verdict(only(small, small.rank <= 4)).verdict == HOLDS
    # What is said of sizes goes by parameters: a higher rank on fewer modules may be the smaller
    # adapter.
    within_margin = max(
        size for rank in (1, 4, 16) if (size := rank * 7680 / 750_000) <= 0.1 * 2 / 3
    )
    assert (
        f"up to {within_margin:.1%} of the model's parameters are within the margin"
        in verdict.reading
    )
    assert "of rank 64, has 65.5% of them and takes 1.32" in verdict.reading


def test_no_margin_is_widened_to_settle_a_claim() -> None:
    near = by_rank({1: {"height": 0.9}}).draw(np.random.default_rng(0), curves=True)
    for verdict in judge(near):
        assert "margin, or" not in verdict.settle
        assert "larger margin" not in verdict.settle


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Rank 1 and full fine-tuning over 6 rates and 2 seeds, through real directories; one run
    failed, one diverged.
    """
    trials, rng = [], np.random.default_rng(0)
    for number, (rank, place) in enumerate((rank, place) for rank in (0, 1) for place in range(6)):
        lr = (1e-5 if rank == 0 else 1e-4) * 2.0**place
        for seed in (0, 1):
            score = 0.9 - 0.06 * (place - 2.5) ** 2 + rng.normal(0, 0.01)
            status, reason = Status.COMPLETE, None
            if (rank, place) == (1, 5):
                status, reason, score = (
                    Status.FAILED,
                    "3 non-finite gradient norms in a row at step 20",
                    0.1,
                )
            trials.append(
                Trial(number, seed, params(rank, lr), float(score), status, reason, last_step=20)
            )
    return load(
        [
            write_sweep(
                tmp_path_factory.mktemp("claims"),
                Sweep(trials, overrides=["trainer.policy.model.lora.sync=merge"]),
            )
        ]
    )


def test_evidence_is_what_the_directories_say(tables: Tables) -> None:
    found = gather(tables.runs, tables.steps)
    assert found is not None
    assert len(contexts(tables.runs)) == 1
    assert sorted(set(found.rank)) == [0, 1]
    assert found.bad.sum() == 2
    assert (found.rank[found.bad] == 1).all()
    assert np.isnan(found.alpha[found.rank == 0]).all()
    assert set(found.targets[found.rank == 1]) == {ALL}
    assert found.base == pytest.approx(149 / 512)
    # 16 prompts with 8 samples each, 20 steps of them.
    assert set(found.batch) == {128}
    assert np.nanmax(found.episodes) == 20 * 128


def test_claims_are_judged_from_directories(tables: Tables) -> None:
    verdicts = {verdict.id: verdict for verdict in judge_tables(tables)}
    assert verdicts["1a"].n == 24
    assert verdicts["1a"].effect == pytest.approx(0.0, abs=0.05)
    assert verdicts["3"].effect == pytest.approx(1.0, abs=0.15)
    assert verdicts["4a"].verdict == UNKNOWN


def test_runs_of_another_experiment_are_not_compared(tables: Tables) -> None:
    other = tables.runs.copy()
    other.loc[other["rank"] == 0, "context"] = "another"
    found = gather(other, tables.steps)
    assert found is not None
    assert len(set(found.rank)) == 1


def test_where_lower_is_better_scores_are_turned_about(tables: Tables) -> None:
    loss = tables.runs.assign(maximize=False)
    for name in ("score", "last", "base"):
        loss[name] = -loss[name]
    up, down = gather(tables.runs, tables.steps), gather(loss, tables.steps)
    assert up is not None
    assert down is not None
    np.testing.assert_array_equal(up.score, down.score)
    assert [verdict.verdict for verdict in judge(up)] == [
        verdict.verdict for verdict in judge(down)
    ]


def test_the_page_of_claims_is_made_from_its_measurements() -> None:
    record = json.loads(bench_claims.RECORD.read_text())
    assert bench_claims.PAGE.read_text() == bench_claims.page(record), "make it again: bench_claims"
    measured = {(row["claim"], row["case"]): row for row in record["cases"]}
    assert set(measured) == {(case.claim, case.name) for case in CASES}
    for row in measured.values():
        assert row["shares"][HOLDS] >= 0.8 if row["true"] else row["shares"][HOLDS] <= 0.05, row
        assert row["true"] or max(row["holds_elsewhere"].values()) <= 0.07, row
