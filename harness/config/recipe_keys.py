"""The keys of a recipe, and the key that was meant by an unknown one."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.config.schema import Recipe
from harness.core.errors import UserError, nearest

# SkyRL's names, most of them later ones, for keys that this project spells as the guide does.
RENAMED = {
    "generator.inference_engine.num_engines": "generator.num_inference_engines",
    "generator.inference_engine.tensor_parallel_size": "generator.inference_engine_tensor_parallel_size",  # noqa: E501
    "generator.inference_engine.gpu_memory_utilization": "generator.gpu_memory_utilization",
    "generator.inference_engine.backend": "generator.backend",
    "trainer.algorithm.kl_estimator_type": "trainer.algorithm.kl_estimator",
    "trainer.algorithm.use_tis": "trainer.algorithm.tis",
    "trainer.algorithm.off_policy_correction.tis_ratio_type": "trainer.algorithm.tis",
    "trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high": "trainer.algorithm.tis_imp_ratio_cap",  # noqa: E501
    "trainer.policy.optimizer_config.adam_betas": "trainer.policy.optimizer_config.betas",
    "trainer.critic.optimizer_config.adam_betas": "trainer.critic.optimizer_config.betas",
    "trainer.max_training_steps": "trainer.max_steps",
    "trainer.bf16": "trainer.policy.model.dtype",
    "generator.model_dtype": "trainer.policy.model.dtype",
}

# Names that PEFT, TRL, verl and transformers give to the last part of a key, too unlike ours to be
# guessed.
OTHER_NAMES = {
    "learning_rate": "lr",
    "lora_rank": "rank",
    "lora_r": "rank",
    "r": "rank",
    "lora_adapter_path": "adapter_path",
    "beta": "kl_loss_coef",
    "batch_size": "train_batch_size",
    "num_train_epochs": "epochs",
    "num_generations": "n_samples_per_prompt",
    "max_new_tokens": "max_generate_length",
    "max_completion_length": "max_generate_length",
    "max_tokens": "max_generate_length",
    "model_name_or_path": "path",
    "model_path": "path",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "eval_steps": "eval_interval",
    "save_steps": "ckpt_interval",
    "output_dir": "ckpt_path",
}

# A value that no key can have.
_OTHER = "\0"
# A mapping under `sweep.space` with one of these keys is an axis.
AXIS_FIELDS = ("choices", "low", "high", "log", "step")

# Settings of SkyRL's guide that have no counterpart here: accepted on the command line and ignored.
WITHOUT_EFFECT = {
    "generator.run_engines_locally": "engines always run beside the trainer, under Ray "
    "where there are several",
    "generator.weight_sync_backend": "adapters travel as trainer.policy.model.lora.sync says",
    "generator.async_engine": "an engine decodes all samples of a step in one batch",
}


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Return every dotted key of a recipe, leaves only, in the schema's order."""
    return tuple(key for key, leaf in _walk(Recipe) if leaf)


@functools.cache
def _sections() -> frozenset[str]:
    return frozenset(key for key, leaf in _walk(Recipe) if not leaf)


def _walk(cls: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        inner = [
            t
            for t in (hints[item.name], *typing.get_args(hints[item.name]))
            if dataclasses.is_dataclass(t)
        ]
        yield prefix + item.name, not inner
        if inner:
            yield from _walk(typing.cast(type, inner[0]), f"{prefix}{item.name}.")


def keys_given(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key that nested values set, known or not.

    Raises UserError where a group of keys has a value.
    """
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in _sections():
            yield from keys_given(value, f"{key}.")
        elif value is not None and key in _sections():
            raise UserError(
                f"{key} is a group of keys, not a value", got=value, fix=f"name one key under {key}"
            )
        else:
            yield key


def check_key(key: str, source: str) -> None:
    """Raise UserError for an unknown dotted key, with the key that was probably meant."""
    known = known_keys()
    open_dicts = ("sweep.space.", "sweep.pruner.", "expect.", "generator.engine_args.")
    if key in known or key in _sections() or key.startswith(open_dicts):
        return
    if key in WITHOUT_EFFECT:
        raise UserError(
            f"{key} has no effect here", got=source, fix=f"leave it out: {WITHOUT_EFFECT[key]}"
        )
    guess = RENAMED.get(key) or _meant(key)
    hint = f"did you mean {guess}?" if guess else "recipes/base.yaml lists every key"
    raise UserError(f"unknown key in {source}", got=key, fix=hint)


def axes_in(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return each axis of `sweep.space` as it is written, by dotted key.

    YAML has dotted keys there, overrides are nested. An axis set to null is left out.
    """
    axes: dict[str, Any] = {}
    for key, axis in _flat_axes(space, ""):
        if isinstance(axis, Mapping) and isinstance(axes.get(key), Mapping):
            axis = {**axes[key], **axis}
        axes[key] = axis
    return {key: axis for key, axis in axes.items() if axis is not None}


def _flat_axes(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        group = isinstance(value, Mapping) and value and key not in known_keys()
        # A group of keys holds groups or axes; a mapping with an axis field is an axis, even if its
        # key is unknown.
        if group and not set(value) & set(AXIS_FIELDS):
            yield from _flat_axes(value, f"{key}.")
        else:
            yield key, value


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by dotted key; an empty mapping has none."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def set_values(plain: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Set dotted keys of nested values in place, and return the nested values."""
    for key, value in values.items():
        *groups, leaf = key.split(".")
        group = plain
        for name in groups:
            if group.get(name) is None:
                group[name] = {}
            group = group[name]
        group[leaf] = value
    return plain


def check_interpolations(plain: dict[str, Any], space: dict[str, Any]) -> None:
    """Raise UserError for an interpolation that reads a key that the sweep varies.

    A recipe is resolved before its trials exist, so all trials would get the same value. `plain`
    has every key, with interpolations as written. Readers of a key are found by giving it another
    value and comparing what is resolved, which finds relative, indirect and partial references too.
    """
    if "${" not in json.dumps(plain):
        return
    resolved = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    for key in (*axes_in(space), "seed", "trainer.seed"):
        other = OmegaConf.create(set_values(copy.deepcopy(plain), {key: _OTHER}))
        try:
            reader = _first_difference(OmegaConf.to_container(other, resolve=True), resolved, key)
        except OmegaConfBaseException as error:  # an interpolation reads a key below the swept one
            reader = str(error.full_key)
        if reader is not None:
            by = "sweep.seeds" if key.endswith("seed") else "sweep.space"
            written: Any = plain
            for name in reader.split("."):
                written = written.get(name, written) if isinstance(written, dict) else written
            raise UserError(
                f"{reader} reads {key}, which {by} varies: it would be the same in all trials",
                got=written,
                fix="write the value out; an axis of its own, and pairs of values in "
                "sweep.first_trials, vary both",
            )


def _first_difference(one: Any, other: Any, but: str, key: str = "") -> str | None:
    """Return the first dotted key other than `but` whose value differs, or None."""
    if key == but or one == other:
        return None
    if not isinstance(one, dict) or not isinstance(other, dict):
        return key
    differences = (
        _first_difference(one[name], other.get(name), but, f"{key}.{name}" if key else name)
        for name in one
    )
    return next((difference for difference in differences if difference is not None), None)


def _meant(key: str) -> str | None:
    """Return the known key or group most like an unknown key, or None.

    The last part counts most. A group that the unknown key is in is never returned.
    """
    last = OTHER_NAMES.get(_last(key), _last(key))
    key = key.removesuffix(_last(key)) + last
    others = [other for other in (*known_keys(), *_sections()) if not key.startswith(f"{other}.")]
    same = [other for other in others if _last(other) == last]
    if same:
        return max(same, key=lambda other: difflib.SequenceMatcher(None, key, other).ratio())
    near = nearest(key, others)
    if near is not None and nearest(last, [_last(near)]) is not None:
        return near
    name = nearest(last, map(_last, known_keys()))
    return next((other for other in known_keys() if _last(other) == name), None)


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]
