"""The keys of a recipe: which there are, and which one a wrong name meant."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator
from typing import Any

from harness.errors import UserError, nearest
from harness.schema import Recipe

# Names in SkyRL, most of them later ones, of keys that this project spells as the guide does.
RENAMED = {
    "generator.inference_engine.num_engines": "generator.num_inference_engines",
    "generator.inference_engine.tensor_parallel_size": "generator.inference_engine_tensor_parallel_size",
    "generator.inference_engine.gpu_memory_utilization": "generator.gpu_memory_utilization",
    "generator.inference_engine.backend": "generator.backend",
    "trainer.algorithm.kl_estimator_type": "trainer.algorithm.kl_estimator",
    "trainer.algorithm.use_tis": "trainer.algorithm.tis",
    "trainer.algorithm.off_policy_correction.tis_ratio_type": "trainer.algorithm.tis",
    "trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high": "trainer.algorithm.tis_imp_ratio_cap",
    "trainer.policy.optimizer_config.adam_betas": "trainer.policy.optimizer_config.betas",
    "trainer.critic.optimizer_config.adam_betas": "trainer.critic.optimizer_config.betas",
    "trainer.max_training_steps": "trainer.max_steps",
    "trainer.bf16": "trainer.policy.model.dtype",
    "generator.model_dtype": "trainer.policy.model.dtype",
}

# Settings of SkyRL's guide that there is nothing to set for here: taken on the command line, and left out.
WITHOUT_EFFECT = {
    "generator.run_engines_locally": "engines always run beside the trainer, under Ray where there are several",
    "generator.weight_sync_backend": "adapters travel as trainer.policy.model.lora.sync says",
    "generator.async_engine": "an engine decodes all samples of a step in one batch",
}


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of a recipe, leaves only, in the schema's order."""
    return tuple(key for key, leaf in _walk(Recipe) if leaf)


@functools.cache
def _sections() -> frozenset[str]:
    return frozenset(key for key, leaf in _walk(Recipe) if not leaf)


def _walk(cls: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        inner = [t for t in (hints[item.name], *typing.get_args(hints[item.name])) if dataclasses.is_dataclass(t)]
        yield prefix + item.name, not inner
        if inner:
            yield from _walk(typing.cast(type, inner[0]), f"{prefix}{item.name}.")


def keys_given(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key that nested values set, known or not; raises UserError where a group of keys has a value."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in _sections():
            yield from keys_given(value, f"{key}.")
        elif value is not None and key in _sections():
            raise UserError(f"{key} is a group of keys, not a value", got=value, fix=f"name one key under {key}")
        else:
            yield key


def check_key(key: str, source: str) -> None:
    """Raise UserError, with the key that was probably meant, unless a recipe has the dotted `key`."""
    known = known_keys()
    open_dicts = ("sweep.space.", "sweep.pruner.", "expect.", "generator.engine_args.")
    if key in known or key in _sections() or key.startswith(open_dicts):
        return
    if key in WITHOUT_EFFECT:
        raise UserError(f"{key} has no effect here", got=source, fix=f"leave it out: {WITHOUT_EFFECT[key]}")
    guess = RENAMED.get(key) or _meant(key)
    hint = f"did you mean {guess}?" if guess else "recipes/base.yaml lists every key"
    raise UserError(f"unknown key in {source}", got=key, fix=hint)


def _meant(key: str) -> str | None:
    """The known key or group that an unknown one is near to: whole, and in its last name; never a group it is in."""
    last = _last(key)
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
