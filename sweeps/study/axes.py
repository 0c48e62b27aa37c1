"""Which keys a sweep may vary: those that change the training, but not how it is measured."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config import metrics
from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.core.errors import UserError

ALGORITHM, PLACEMENT = "trainer.algorithm", "trainer.placement"
POLICY, CRITIC = "trainer.policy.model.lora", "trainer.critic.model.lora"
# How trials are measured. A name that ends in a point stands for all keys below it.
MEASURE = (
    "data.val_data",
    "data.question_column",
    "data.answer_column",
    "generator.eval_sampling_params.",
    "generator.eval_n_samples_per_prompt",
    "generator.max_input_length",
    "trainer.max_prompt_length",
    "trainer.eval_interval",
    "environment.env_class",
)
# What a run records, and where.
RECORDS = (
    "trainer.logger",
    "trainer.project_name",
    "trainer.max_ckpts_to_keep",
    "trainer.samples_per_dump",
    "trainer.eval_before_train",
    "trainer.max_bad_steps",
    "trainer.sync_tolerance",
    f"{POLICY}.lora_sync_path",
    "ray.address",
    "expect",
)
# These keys change time and memory; the results are the same (docs/guides/cluster.md).
SPEED = (
    f"{PLACEMENT}.",
    "trainer.num_threads",
    "trainer.micro_forward_batch_size_per_gpu",
    "trainer.micro_train_batch_size_per_gpu",
    "trainer.max_tokens_per_microbatch",
    "trainer.gradient_checkpointing",
    "trainer.ckpt_interval",
    "trainer.eval_batch_size",
    "generator.num_inference_engines",
    "generator.inference_engine_tensor_parallel_size",
    "generator.gpu_memory_utilization",
    "generator.cpu_kv_cache_gb",
    "generator.max_num_seqs",
    "generator.max_lora_rank",
    "generator.batched",
    "deterministic",
)


@dataclass(frozen=True, slots=True)
class Need:
    """A condition on other keys under which a key has an effect.

    Attributes:
        words: the condition as text.
        keys: the other keys.
        holds: whether the condition holds, from their values in this order.
    """

    words: str
    keys: tuple[str, ...]
    holds: Callable[..., bool]


def _is(key: str, *values: Any) -> Need:
    words = f"{key}={' or '.join(map(_as_yaml, values))}"
    return Need(words, (key,), lambda value: value in values)


def _is_not(key: str, excluded: Any) -> Need:
    return Need(f"{key} other than {_as_yaml(excluded)}", (key,), lambda value: value != excluded)


def _as_yaml(value: Any) -> str:
    return {None: "null", True: "true"}.get(value, str(value))


_ESTIMATOR, _LOSS = f"{ALGORITHM}.advantage_estimator", f"{ALGORITHM}.policy_loss_type"
_BATCH, _MINI, _EPOCHS = (
    "trainer.train_batch_size",
    "trainer.policy_mini_batch_size",
    "trainer.update_epochs_per_batch",
)
_CRITIC_MINI = "trainer.critic_mini_batch_size"
_GAE = _is(_ESTIMATOR, "gae")
# In a batch's first update the policy is still the one that sampled it: every ratio is 1, and
# clipping has no effect.
_REUSED = Need(
    "several updates a batch (policy_mini_batch_size below train_batch_size, or "
    "update_epochs_per_batch above 1)",
    (_BATCH, _MINI, _EPOCHS, f"{POLICY}.dropout"),
    lambda batch, mini, epochs, dropout: mini < batch or epochs > 1 or dropout > 0,
)
_REUSED_BY_CRITIC = Need(
    "several of the critic's updates a batch (critic_mini_batch_size below train_batch_size, or "
    "update_epochs_per_batch above 1)",
    (_BATCH, _MINI, _CRITIC_MINI, _EPOCHS, f"{CRITIC}.dropout"),
    lambda batch, mini, critic, epochs, dropout: (
        (critic or mini) < batch or epochs > 1 or dropout > 0
    ),
)
_KL = Need(
    f"{ALGORITHM}.use_kl_loss=true or {ALGORITHM}.use_kl_in_reward=true",
    (f"{ALGORITHM}.use_kl_loss", f"{ALGORITHM}.use_kl_in_reward"),
    lambda in_loss, in_reward: in_loss or in_reward,
)


def _default_of_adapters(name: str) -> list[Need]:
    """Return the condition for `trainer.<name>`: some adapter does not set `<name>` itself."""
    return [
        Need(
            f"an adapter of rank above 0 whose own {name} is null",
            (
                _ESTIMATOR,
                f"{POLICY}.rank",
                f"{POLICY}.{name}",
                f"{CRITIC}.rank",
                f"{CRITIC}.{name}",
            ),
            lambda estimator, rank, policy, critic_rank, critic: (
                (rank > 0 and policy is None)
                or (estimator == "gae" and critic_rank > 0 and critic is None)
            ),
        )
    ]


_START = _is_not(f"{POLICY}.adapter_path", None)
_LORA_KEYS = (
    "expert_rank",
    "alpha",
    "dropout",
    "target_modules",
    "exclude_modules",
    "init_method",
)
NEEDS: dict[str, list[Need]] = {
    "trainer.critic.": [_GAE],
    "trainer.critic_mini_batch_size": [_GAE],
    **{f"{CRITIC}.{name}": [_GAE, _is_not(f"{CRITIC}.rank", 0)] for name in _LORA_KEYS},
    **{f"{POLICY}.{name}": [_is_not(f"{POLICY}.rank", 0)] for name in (*_LORA_KEYS, "sync")},
    f"{POLICY}.adapter_path": [_is_not(f"{POLICY}.rank", 0)],
    f"{POLICY}.init_method": [
        _is_not(f"{POLICY}.rank", 0),
        _is(f"{POLICY}.adapter_path", None),
    ],
    "trainer.reference": [_KL, _START],
    "trainer.target_modules": _default_of_adapters("target_modules"),
    "trainer.exclude_modules": _default_of_adapters("exclude_modules"),
    "trainer.epochs": [_is("trainer.max_steps", None)],
    f"{ALGORITHM}.grpo_norm_by_std": [_is(_ESTIMATOR, "grpo"), _is_not(_LOSS, "dr_grpo")],
    f"{ALGORITHM}.gamma": [_is(_ESTIMATOR, "gae", "reinforce++")],
    f"{ALGORITHM}.lambd": [_GAE],
    f"{ALGORITHM}.loss_reduction": [_is_not(_LOSS, "dr_grpo")],
    f"{ALGORITHM}.eps_clip_low": [_is_not(_LOSS, "cispo"), _REUSED],
    f"{ALGORITHM}.eps_clip_high": [_REUSED],
    f"{ALGORITHM}.clip_ratio_c": [_is(_LOSS, "dual_clip"), _REUSED],
    f"{ALGORITHM}.value_clip": [_GAE, _REUSED_BY_CRITIC],
    f"{ALGORITHM}.kl_loss_coef": [_KL],
    f"{ALGORITHM}.kl_estimator": [_KL],
    f"{ALGORITHM}.tis_imp_ratio_cap": [_is_not(f"{ALGORITHM}.tis", "none")],
    f"{ALGORITHM}.dynamic_sampling.max_sample_batches": [
        _is(f"{ALGORITHM}.dynamic_sampling.type", "filter")
    ],
    f"{ALGORITHM}.dynamic_sampling.min_replace_ratio": [
        _is(f"{ALGORITHM}.dynamic_sampling.type", "replace")
    ],
}


def check_kind(key: str, metric: str) -> None:
    """Raise UserError for a key that a sweep for this metric may not vary."""
    fix = f"sweep.space.{key}=null removes the axis"
    if _matches(key, MEASURE):
        if key == "environment.env_class":
            fix = "name each file's environment in its env_class column, and sweep data.train_data"
        raise UserError(
            "sweep.space: this key changes how trials are measured: their scores could "
            "not be compared",
            got=key,
            allowed="keys that change the training alone",
            fix=fix,
        )
    if _matches(key, RECORDS):
        raise UserError(
            "sweep.space: this key changes what is recorded or where, not what a trial learns",
            got=key,
            fix=fix,
        )
    if _matches(key, SPEED) and not metrics.lookup(metric).timing:
        raise UserError(
            "sweep.space: this key changes how fast a trial is, not what it learns",
            got=key,
            allowed=f"with a metric of time or memory (sweep.metric is {metric})",
            fix=fix,
        )


def check_effect(axes: Mapping[str, Sequence[Any]], recipe: Recipe) -> None:
    """Raise UserError for an axis that has no effect, whatever values the other axes have.

    `axes` holds each axis's choices or bounds. Other keys have the recipe's value.
    """
    plain = recipes.to_dict(recipe)

    def values(key: str) -> Sequence[Any]:
        return axes.get(key) or [functools.reduce(operator.getitem, key.split("."), plain)]

    for key in axes:
        needs = [need for name in NEEDS if _matches(key, (name,)) for need in NEEDS[name]]
        for need in needs:
            combinations = itertools.product(*map(values, need.keys))
            if not any(need.holds(*combination) for combination in combinations):
                current = (f"{name}={'|'.join(map(_as_yaml, values(name)))}" for name in need.keys)
                raise UserError(
                    f"sweep.space: {key} has no effect here",
                    got=", ".join(current),
                    allowed=f"with {need.words}",
                    fix=f"set that, or remove the axis: sweep.space.{key}=null",
                )


def _matches(key: str, names: Sequence[str]) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)
