"""Test which keys a sweep may vary: no measures, and none without effect."""

from __future__ import annotations

from typing import Any

import pytest

from harness.config import recipe as recipes
from harness.config.digest import PLACE_KEYS
from harness.config.recipe_keys import known_keys
from harness.core.errors import UserError
from sweeps.study import axes
from sweeps.study.space import from_recipe
from tests.unit.sweeps.curves import ALPHA, LR, RANK, TARGETS, recipe_of

ALGORITHM, CRITIC, POLICY = "trainer.algorithm", "trainer.critic", "trainer.policy"
GAE, KL = {f"{ALGORITHM}.advantage_estimator": "gae"}, {f"{ALGORITHM}.use_kl_loss": True}
CRITIC_LR = f"{CRITIC}.optimizer_config.lr"
OPTIMIZER = ("lr", "betas", "weight_decay", "max_grad_norm", "scheduler", "num_warmup_steps")
LORA = (
    "rank",
    "expert_rank",
    "alpha",
    "dropout",
    "target_modules",
    "exclude_modules",
    "init_method",
)
# Keys that change the training, at least with certain values of other keys.
SWEPT = {
    "data.train_data",
    f"{POLICY}.model.path",
    f"{POLICY}.model.dtype",
    f"{POLICY}.model.lora.sync",
    f"{POLICY}.model.lora.adapter_path",
    "trainer.reference",
    f"{CRITIC}.model.path",
    "trainer.target_modules",
    "trainer.exclude_modules",
    "trainer.strategy",
    "trainer.train_batch_size",
    "trainer.policy_mini_batch_size",
    "trainer.critic_mini_batch_size",
    "trainer.update_epochs_per_batch",
    "trainer.epochs",
    "trainer.max_steps",
    "generator.backend",
    "generator.enforce_eager",
    "generator.engine_args",
    "generator.n_samples_per_prompt",
    "generator.apply_overlong_filtering",
    *(
        f"generator.sampling_params.{name}"
        for name in ("max_generate_length", "temperature", "top_p", "top_k")
    ),
    *(f"{role}.optimizer_config.{name}" for role in (POLICY, CRITIC) for name in OPTIMIZER),
    *(f"{role}.model.lora.{name}" for role in (POLICY, CRITIC) for name in LORA),
    *(key for key in known_keys() if key.startswith(f"{ALGORITHM}.")),
}


def refused(space: dict[str, Any], **values: Any) -> str:
    """Return the error for a space, with values set in the recipe; "" where it is valid."""
    try:
        from_recipe(recipes.with_values(recipe_of(space), values))
    except UserError as error:
        return str(error)
    return ""


def test_every_key_is_an_axis_or_refused() -> None:
    allowed = set()
    for key in known_keys():
        if (
            key not in PLACE_KEYS
            and not key.startswith("sweep.")
            and key not in ("seed", "trainer.seed")
        ):
            try:
                axes.check_kind(key, "eval/accuracy")
                allowed.add(key)
            except UserError:
                continue
    assert allowed == SWEPT
    assert {need for need in axes.NEEDS if not need.endswith(".")} <= SWEPT
    named = {key for needs in axes.NEEDS.values() for need in needs for key in need.keys}
    assert named <= set(known_keys())


@pytest.mark.parametrize(
    ("key", "choices", "message"),
    [
        ("data.val_data", [["a.parquet"], ["b.parquet"]], "how trials are measured"),
        ("generator.eval_sampling_params.temperature", [0.0, 1.0], "how trials are measured"),
        ("generator.eval_sampling_params.max_generate_length", [8, 16], "how trials are measured"),
        ("generator.eval_n_samples_per_prompt", [1, 4], "how trials are measured"),
        ("generator.max_input_length", [32, 64], "how trials are measured"),
        ("trainer.max_prompt_length", [32, 64], "how trials are measured"),
        ("trainer.eval_interval", [1, 2], "how trials are measured"),
        ("environment.env_class", ["gsm8k", "math"], "in its env_class column"),
        ("trainer.eval_batch_size", [8, 16], "how fast a trial is"),
        ("trainer.placement.policy_num_gpus_per_node", [1, 2], "how fast a trial is"),
        ("trainer.logger", [["console"], ["wandb"]], "what is recorded"),
    ],
)
def test_measures_and_records_are_no_axes(key: str, choices: list[Any], message: str) -> None:
    refusal = refused({RANK: {"choices": [1, 8]}, key: {"choices": choices}})
    assert message in refusal
    assert key in refusal


def test_keys_of_speed_may_be_swept_with_a_metric_of_time() -> None:
    space = {"trainer.micro_train_batch_size_per_gpu": {"choices": [4, 8]}}
    assert "sweep.metric is eval/accuracy" in refused(space)
    assert from_recipe(recipe_of(space, metric="step_time")).size == 2


@pytest.mark.parametrize(
    ("key", "choices", "otherwise"),
    [
        (CRITIC_LR, [1e-4, 1e-3], GAE),
        (f"{CRITIC}.model.lora.rank", [1, 8], GAE),
        ("trainer.critic_mini_batch_size", [64, 128], GAE),
        (f"{CRITIC}.model.lora.alpha", [8, 16], GAE),
        (f"{ALGORITHM}.lambd", [0.9, 1.0], GAE),
        (f"{ALGORITHM}.gamma", [0.9, 1.0], {f"{ALGORITHM}.advantage_estimator": "reinforce++"}),
        (f"{ALGORITHM}.value_clip", [0.1, 0.2], {**GAE, "trainer.update_epochs_per_batch": 2}),
        (f"{ALGORITHM}.kl_loss_coef", [0.001, 0.01], KL),
        (f"{ALGORITHM}.kl_estimator", ["k1", "k3"], {f"{ALGORITHM}.use_kl_in_reward": True}),
        (f"{ALGORITHM}.tis_imp_ratio_cap", [2.0, 4.0], {f"{ALGORITHM}.tis": "token"}),
        (
            f"{ALGORITHM}.clip_ratio_c",
            [2.0, 3.0],
            {f"{ALGORITHM}.policy_loss_type": "dual_clip", "trainer.policy_mini_batch_size": 64},
        ),
        (f"{ALGORITHM}.eps_clip_low", [0.1, 0.2], {"trainer.policy_mini_batch_size": 64}),
        (f"{ALGORITHM}.eps_clip_high", [0.1, 0.2], {"trainer.update_epochs_per_batch": 2}),
        (
            f"{ALGORITHM}.dynamic_sampling.max_sample_batches",
            [2, 4],
            {f"{ALGORITHM}.dynamic_sampling.type": "filter"},
        ),
        (
            f"{ALGORITHM}.dynamic_sampling.min_replace_ratio",
            [0.1, 0.4],
            {f"{ALGORITHM}.dynamic_sampling.type": "replace"},
        ),
        ("trainer.epochs", [1, 2], {"trainer.max_steps": None}),
    ],
)
def test_an_axis_without_effect_is_refused(
    key: str, choices: list[Any], otherwise: dict[str, Any]
) -> None:
    axis = {key: {"choices": choices}}
    message = refused(axis)
    assert f"{key} has no effect here" in message
    assert f"sweep.space.{key}=null" in message
    assert refused(axis, **otherwise) == ""


def test_an_axis_may_have_an_effect_through_another_axis() -> None:
    axis = {CRITIC_LR: {"low": 1e-4, "high": 1e-2, "log": True}}
    assert refused({**axis, f"{ALGORITHM}.advantage_estimator": {"choices": ["grpo", "gae"]}}) == ""
    assert "grpo|rloo" in refused(
        {**axis, f"{ALGORITHM}.advantage_estimator": {"choices": ["grpo", "rloo"]}}
    )


def test_a_key_that_another_one_overrides_is_no_axis() -> None:
    policy_targets = {f"{POLICY}.model.lora.target_modules": "mlp"}
    axis = {TARGETS: {"choices": ["mlp", "attention"]}}
    assert "whose own target_modules is null" in refused(axis, **policy_targets)
    assert refused(axis, **policy_targets, **GAE) == ""  # the critic still uses the trainer's
    assert "whose own target_modules is null" in refused(
        axis, **policy_targets, **GAE, **{f"{CRITIC}.model.lora.rank": 0}
    )
    for key in ("grpo_norm_by_std", "loss_reduction"):
        choices: list[Any] = (
            [True, False] if key == "grpo_norm_by_std" else ["token_mean", "sequence_mean"]
        )
        axis = {f"{ALGORITHM}.{key}": {"choices": choices}}
        assert refused(axis) == ""
        assert "has no effect here" in refused(axis, **{f"{ALGORITHM}.policy_loss_type": "dr_grpo"})


def test_lora_keys_need_a_rank() -> None:
    full, axis = (
        {RANK: 0},
        {ALPHA: {"low": 8, "high": 64}, LR: {"low": 1e-6, "high": 1e-4, "log": True}},
    )
    assert f"{ALPHA} has no effect here" in refused(axis, **full)
    assert refused({**axis, RANK: {"choices": [0, 8]}}, **full) == ""
