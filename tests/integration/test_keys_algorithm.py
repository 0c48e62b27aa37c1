"""Test algorithm keys in short real runs.

These are dynamic sampling, filters, KL in the reward, importance weights and the sync tolerance.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from harness.config.schema import Recipe
from harness.records.run_dir import RunDir, Status
from rltrain.algorithms.dynamic_sampling import groups_with_signal
from rltrain.algorithms.trained_model import Row
from rltrain.engines.base import SyncError
from rltrain.member import sync_tolerance
from rltrain.pack import Pack
from rltrain.rollout import Rollout, sample_rollouts
from rltrain.step import train_step
from tests.integration.training import MakeRecipe, MakeRun, Open, rows, train_run

ALGORITHM = "trainer.algorithm"
FILTER = f"{ALGORITHM}.dynamic_sampling.type=filter"


def _run(recipe: Recipe, run: RunDir, stop_after: int | None = None) -> list[Row]:
    """Train a run and return its rows."""
    train_run(recipe, run, stop_after=stop_after)
    return rows(run)


def _rolled_out(pack: Pack) -> tuple[Rollout, Row]:
    ((scored, stats),) = sample_rollouts(pack, pack.members).values()
    return scored, stats


def test_filter_samples_until_the_batch_has_signal(opened: Open) -> None:
    pack, _ = opened()
    plain, _ = _rolled_out(pack)
    assert 0 < len(groups_with_signal(plain.rewards)) < 4
    pack, member = opened(FILTER)
    scored, stats = _rolled_out(pack)
    assert groups_with_signal(scored.rewards) == [0, 1, 2, 3]
    assert member.batches == stats["num_sampled_batches"] > 1
    # The first batch's groups with a signal come first.
    kept = [plain.problems[i].example.index for i in groups_with_signal(plain.rewards)]
    assert [problem.example.index for problem in scored.problems][: len(kept)] == kept
    assert stats["frac_reward_zero_std"] > 0
    pack, member = opened(FILTER, f"{ALGORITHM}.dynamic_sampling.max_sample_batches=1")
    scored, stats = _rolled_out(pack)
    assert len(groups_with_signal(scored.rewards)) == len(kept) < len(scored.problems) == 4
    assert member.batches == stats["num_sampled_batches"] == 1


def test_replace_fills_the_batch_with_copies(opened: Open) -> None:
    pack, member = opened(
        f"{ALGORITHM}.dynamic_sampling.type=replace",
        f"{ALGORITHM}.dynamic_sampling.min_replace_ratio=0",
    )
    scored, stats = _rolled_out(pack)
    assert stats["num_replaced_groups"] > 0
    assert member.batches == 1
    assert groups_with_signal(scored.rewards) == [0, 1, 2, 3]
    assert (
        len({problem.example.index for problem in scored.problems})
        == 4 - stats["num_replaced_groups"]
    )
    pack, _ = opened(
        f"{ALGORITHM}.dynamic_sampling.type=replace",
        f"{ALGORITHM}.dynamic_sampling.min_replace_ratio=1",
    )
    assert _rolled_out(pack)[1]["num_replaced_groups"] == 0


def test_resumed_run_with_dynamic_sampling_equals_uninterrupted_run(
    small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = small_recipe(FILTER)
    uninterrupted, resumed = new_run(recipe, "uninterrupted"), new_run(recipe, "resumed")
    expected = _run(recipe, uninterrupted)
    _run(recipe, resumed, stop_after=4)  # one step past the checkpoint
    assert resumed.status is Status.RUNNING
    state = json.loads((resumed.checkpoints / "step_000002" / "state.json").read_text())
    assert state["step"] == 2
    assert state["batches"] == sum(row["num_sampled_batches"] for row in expected[1:3]) > 2
    assert _run(recipe, resumed) == expected
    adapters = [
        load_file(run.adapter / "final" / "adapter_model.safetensors")
        for run in (uninterrupted, resumed)
    ]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.mark.parametrize(
    ("override", "share"),
    [
        (f"{ALGORITHM}.zero_variance_filter=true", "frac_reward_zero_std"),
        ("generator.apply_overlong_filtering=true", "completions/clipped_ratio"),
    ],
)
def test_share_of_filtered_groups_is_logged(opened: Open, override: str, share: str) -> None:
    pack, member = opened(override, "generator.sampling_params.max_generate_length=40")
    row = train_step(pack, pack.members)[member]
    assert 0 < row[share] < 1
    assert row["frac_masked_completions"] == pytest.approx(row[share])
    assert row["num_tokens"] > row["completions/mean_length"] * 16  # filtered prompts count as seen


def test_a_batch_of_only_truncated_completions_trains_nothing(
    small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    short = (
        "generator.apply_overlong_filtering=true",
        "generator.sampling_params.max_generate_length=1",
    )
    recipe = small_recipe(*short, "trainer.max_steps=1")
    run = new_run(recipe, "cut")
    row = _run(recipe, run)[-1]
    assert row["frac_masked_completions"] == row["completions/clipped_ratio"] == 1
    assert "loss" not in row
    adapter = load_file(run.adapter / "final" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
    assert run.status is Status.COMPLETE


def test_kl_in_the_reward_grows_as_the_policy_moves(
    small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = small_recipe(
        f"{ALGORITHM}.use_kl_in_reward=true", "trainer.policy.optimizer_config.lr=1e-2"
    )
    rows = _run(recipe, new_run(recipe, "kl"))[1:]
    assert rows[0]["kl_in_reward"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl_in_reward"] > 1e-4
    assert "kl" not in rows[-1]


@pytest.mark.parametrize("tis", ["none", "token", "sequence"])
def test_importance_weights_are_near_one_where_engine_and_trainer_agree(
    opened: Open, tis: str
) -> None:
    pack, member = opened(f"{ALGORITHM}.tis={tis}", "trainer.policy_mini_batch_size=4")
    row = train_step(pack, pack.members)[member]
    assert row.get("sampling/importance_sampling_ratio/mean") == (
        None if tis == "none" else pytest.approx(1.0, abs=1e-3)
    )


@pytest.mark.parametrize(
    "backward",
    [f"{ALGORITHM}.advantage_estimator=reinforce++", f"{ALGORITHM}.policy_loss_type=gspo"],
)
def test_each_setting_changes_the_update_of_the_same_samples(opened: Open, backward: str) -> None:
    rows = []
    for overrides in ([], [backward]):
        pack, member = opened(*overrides)
        rows.append(train_step(pack, pack.members)[member])
    assert rows[0]["reward"] == rows[1]["reward"]
    assert rows[0]["grad_norm"] != pytest.approx(rows[1]["grad_norm"], rel=1e-4)


def test_a_sync_outside_sync_tolerance_is_refused(opened: Open, small_recipe: MakeRecipe) -> None:
    pack, _ = opened("trainer.sync_tolerance=1e-12")
    with pytest.raises(SyncError, match="tolerance 1.00e-12"):
        train_step(pack, pack.members)
    assert sync_tolerance(small_recipe("trainer.sync_tolerance=0.25")) == 0.25
    assert sync_tolerance(small_recipe()) == 1e-3
    assert sync_tolerance(small_recipe("trainer.policy.model.dtype=bfloat16")) == 5e-2
    assert sync_tolerance(small_recipe("generator.sampling_params.top_p=0.9")) == math.inf
    assert (
        sync_tolerance(
            small_recipe("generator.sampling_params.top_k=9", "trainer.sync_tolerance=0.25")
        )
        == 0.25
    )
