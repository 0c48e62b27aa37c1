"""Test the next configuration: first trials, samplers, no repeats, and only history decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from harness.config import recipe as recipes
from harness.core.errors import UserError
from sweeps.study import plan as plans
from sweeps.study.plan import Observation, Plan, propose
from sweeps.study.space import identity
from tests.unit.sweeps.curves import ALPHA, LR, RANK, TARGETS, recipe_of

FINITE = {RANK: {"choices": [1, 8, 32]}, ALPHA: {"choices": [16, 32]}}
BATCH, MINI = "trainer.train_batch_size", "trainer.policy_mini_batch_size"


def plan_of(space: dict[str, Any] | None = None, **sweep: Any) -> Plan:
    return plans.build(recipe_of(space, **sweep))


def walk(plan: Plan) -> list[dict[str, Any]]:
    """Return every configuration, without any results."""
    history: list[Observation] = []
    while (params := propose(plan, history)) is not None:
        history.append(Observation(params))
    return [observation.params for observation in history]


def unique(params: list[dict[str, Any]]) -> int:
    return len({identity(p) for p in params})


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_next_configuration_depends_on_the_history_alone(sampler: str) -> None:
    seen = [
        Observation(p, TrialState.COMPLETE, 0.5 + i / 50)
        for i, p in enumerate(walk(plan_of(num_trials=12)))
    ]
    plan = plan_of(sampler=sampler, num_trials=20)
    assert propose(plan, seen) == propose(plan_of(sampler=sampler, num_trials=20), list(seen))
    # A new sampler with the same seed each time would repeat its first suggestion.
    assert unique([p for n in range(12) if (p := propose(plan, seen[:n]))]) == 12


def test_tpe_learns_from_results() -> None:
    plan = plan_of({LR: {"low": 1e-5, "high": 1e-2, "log": True}}, sampler="tpe", num_trials=60)
    history: list[Observation] = []
    while (params := propose(plan, history)) is not None:
        near = abs(params[LR] - 1e-3) < 9e-4
        history.append(Observation(params, TrialState.COMPLETE, 0.9 if near else 0.1))
    late = [result for result in history[30:] if result.value == 0.9]
    assert len(late) > 20


def test_minimised_metrics_are_minimised() -> None:
    assert plan_of(metric="completions/clipped_ratio").direction == "minimize"


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_finite_space_is_covered_without_repeats(sampler: str) -> None:
    plan = plan_of(FINITE, sampler=sampler, num_trials=50, seeds=[0, 1])
    tried = walk(plan)
    assert (plan.num_configurations, plan.num_runs) == (6, 12)
    assert len(tried) == unique(tried) == 6
    assert propose(plan, [Observation(p) for p in tried]) is None


def test_a_whole_grid_goes_in_order_and_a_part_of_it_covers_every_value() -> None:
    grid = walk(plan_of(FINITE, sampler="grid", num_trials=6))
    assert [p[RANK] for p in grid] == [1, 1, 8, 8, 32, 32]
    space = {RANK: {"choices": [1, 2, 4, 8]}, ALPHA: {"choices": [8, 16, 32, 64]}}
    part = walk(plan_of(space, sampler="grid", num_trials=8))
    assert len(part) == unique(part) == 8
    assert {p[RANK] for p in part} == {1, 2, 4, 8}


def test_first_trials_come_first_and_the_sampler_completes_them() -> None:
    first = [{RANK: 8, LR: 0.001, TARGETS: ["q_proj", "v_proj"]}, {RANK: 32}]
    tried = walk(plan_of(first_trials=first))
    assert tried[0] == first[0]
    assert tried[1][RANK] == 32
    assert set(tried[1]) == {RANK, LR, TARGETS}
    assert unique(tried) == 4


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_the_sampler_does_not_propose_later_first_trials(sampler: str) -> None:
    first = [{RANK: 8}, {RANK: 8, ALPHA: 16}, {RANK: 8}]
    tried = walk(plan_of(FINITE, sampler=sampler, num_trials=6, first_trials=first))
    assert [p[RANK] for p in tried[:2]] == [8, 8]
    assert (tried[0][ALPHA], tried[1][ALPHA]) == (32, 16)
    # Rank 8 has been tried: the sampler proposes another configuration, and the sweep continues.
    assert unique(tried) == 6


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ([{"trainer.policy.model.lora.rnk": 8}], f"did you mean {RANK}?"),
        ([{ALPHA: 8}], "no axis"),
        ([{RANK: 7}], "outside its axis"),
        ([{RANK: "8"}], "outside its axis"),
        ([{LR: 1.0}], "outside its axis"),
        ([{LR: True}], "outside its axis"),
        ([{}], "names no axis"),
        ([{RANK: 8, LR: 1e-4, TARGETS: "all-linear"}] * 2, "repeats"),
    ],
)
def test_wrong_first_trials_are_refused(first: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(first_trials=first)
    assert message in str(caught.value)


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_configurations_that_the_recipe_refuses_are_skipped(sampler: str) -> None:
    # 4 of the 6 pairs: a mini-batch must divide its batch.
    space = {BATCH: {"choices": [128, 192]}, MINI: {"choices": [64, 96, 128]}}
    tried = walk(plan_of(space, sampler=sampler, num_trials=6))
    assert len(tried) == 4
    assert all(p[BATCH] % p[MINI] == 0 for p in tried)
    with pytest.raises(UserError, match=r"first_trials\[0\].*must divide"):
        plan_of(space, sampler=sampler, first_trials=[{BATCH: 128, MINI: 96}])


def test_a_grid_needs_values() -> None:
    with pytest.raises(UserError, match="a list of values on each axis"):
        plan_of(sampler="grid")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("eval/acuracy", "did you mean eval/accuracy?"),
        ("kl", "neither direction is better"),
        ("eval/pass@4", "generator.eval_n_samples_per_prompt=4"),
    ],
)
def test_a_metric_that_cannot_be_optimised_is_refused(metric: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(metric=metric)
    assert message in str(caught.value)


def test_training_data_must_fill_the_largest_batch(tmp_path: Path) -> None:
    files = []
    for rows in (128, 200):
        files.append(str(tmp_path / f"{rows}.jsonl"))
        Path(files[-1]).write_text("{}\n" * rows)
    batches = {BATCH: {"choices": [128, 192]}, MINI: {"choices": [64]}}
    enough = {"data.train_data": {"choices": [[files[1]], files]}}
    assert plan_of(batches | enough).space.size == 4
    with pytest.raises(
        UserError, match=r"fewer problems than one batch\n  got:     128 problems.*=192"
    ):
        plan_of(batches | {"data.train_data": {"choices": [[file] for file in files]}})
    with pytest.raises(UserError, match="fewer problems than one batch"):
        plans.build(recipes.with_values(recipe_of(batches), {"data.train_data": files[:1]}))
