"""What a recipe's values must satisfy, apart and together; raises UserError naming the key."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

from harness.errors import UserError
from harness.schema import Backend, Recipe, SyncMode

_BOUNDS = {"ge": (operator.ge, ">="), "gt": (operator.gt, ">"), "le": (operator.le, "<="), "lt": (operator.lt, "<")}

# PEFT inits that rewrite the base weights: the disabled adapter is then no reference, the engine's base not ours.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga", "orthogonal")
INITS = ("kaiming", "gaussian")
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check(recipe: Recipe) -> None:
    """Check every bound and every rule between keys."""
    _check_bounds(recipe, "")
    if recipe.trainer.seed is not None:
        _merge_seed(recipe)
    _check_batches(recipe)
    _check_lora(recipe)
    _check_sampling(recipe)
    _check_optimizer(recipe)
    if recipe.sweep is not None:
        _check_sweep(recipe)


def _check_bounds(node: Any, prefix: str) -> None:
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            _check_bounds(value, f"{key}.")
        elif value is not None and item.metadata:
            wanted = [f"{_BOUNDS[name][1]} {limit:g}" for name, limit in item.metadata.items()]
            held = all(_BOUNDS[name][0](value, limit) for name, limit in item.metadata.items())
            if not held or not math.isfinite(value):
                raise UserError(f"{key} is out of range", got=value, allowed=" and ".join(wanted))


def _merge_seed(recipe: Recipe) -> None:
    """`trainer.seed` is the guide's name for the top-level `seed`."""
    assert recipe.trainer.seed is not None
    if recipe.seed not in (0, recipe.trainer.seed):
        raise UserError(
            "seed and trainer.seed are the same setting, given twice",
            got=f"seed={recipe.seed}, trainer.seed={recipe.trainer.seed}",
            fix="give seed alone",
        )
    recipe.seed, recipe.trainer.seed = recipe.trainer.seed, None


def _check_batches(recipe: Recipe) -> None:
    trainer = recipe.trainer
    batch, mini = trainer.train_batch_size, trainer.policy_mini_batch_size
    if mini > batch or batch % mini:
        raise UserError(
            "trainer.policy_mini_batch_size must divide trainer.train_batch_size (both count prompts)",
            got=f"policy_mini_batch_size={mini}, train_batch_size={batch}",
            fix=f"trainer.policy_mini_batch_size={math.gcd(batch, mini)}",
        )


def _check_lora(recipe: Recipe) -> None:
    trainer, lora = recipe.trainer, recipe.trainer.policy.model.lora
    key = "trainer.policy.model.lora"
    if lora.init_method in BASE_CHANGING_INITS or lora.init_method.startswith(("pissa", "corda")):
        raise UserError(
            f"{key}.init_method changes the base weights: the disabled adapter would be no reference, "
            "and the engine would sample from another base",
            got=lora.init_method,
            allowed=", ".join(INITS),
        )
    if lora.init_method not in INITS:
        raise UserError(f"{key}.init_method is unknown", got=lora.init_method, allowed=", ".join(INITS))
    if lora.rank == 0 and lora.sync is not SyncMode.merge and recipe.generator.backend is Backend.vllm:
        raise UserError(
            f"{key}.rank=0 is full fine-tuning: there is no adapter to write",
            got=f"sync={lora.sync.name}",
            fix=f"{key}.sync=merge",
        )
    for name, value in (
        ("trainer.target_modules", target_modules(recipe)),
        ("trainer.exclude_modules", exclude_modules(recipe)),
    ):
        _check_modules(name, value)
    limit = recipe.generator.max_lora_rank
    if limit is not None and lora.rank > limit:
        raise UserError(f"{key}.rank is above generator.max_lora_rank", got=lora.rank, allowed=f"<= {limit}")
    if trainer.algorithm.use_kl_loss and trainer.algorithm.kl_loss_coef == 0:
        raise UserError(
            "trainer.algorithm.use_kl_loss with a coefficient of 0 computes a reference for nothing",
            got="kl_loss_coef=0",
            fix="trainer.algorithm.use_kl_loss=false",
        )


def target_modules(recipe: Recipe) -> Any:
    """The policy's LoRA targets: its own if set, else the trainer's."""
    own = recipe.trainer.policy.model.lora.target_modules
    return recipe.trainer.target_modules if own is None else own


def exclude_modules(recipe: Recipe) -> Any:
    """The policy's excluded modules: its own if set, else the trainer's."""
    own = recipe.trainer.policy.model.lora.exclude_modules
    return recipe.trainer.exclude_modules if own is None else own


def engine_lora_rank(recipe: Recipe) -> int:
    """The rank vLLM reserves room for: the recipe's limit or the adapter's rank, rounded up to one that vLLM serves."""
    wanted = recipe.generator.max_lora_rank or recipe.trainer.policy.model.lora.rank
    return next(rank for rank in VLLM_LORA_RANKS if rank >= wanted)


def check_context(recipe: Recipe, limit: int) -> None:
    """Raise UserError when prompt and completion together may be longer than the model's positions."""
    generator = recipe.generator
    completion = max(generator.sampling_params.max_generate_length, generator.eval_sampling_params.max_generate_length)
    if generator.max_input_length + completion > limit:
        raise UserError(
            "prompts and completions may be longer than the model's context",
            got=f"generator.max_input_length={generator.max_input_length} + max_generate_length={completion}",
            allowed=f"<= {limit} together (max_position_embeddings)",
            fix="lower generator.max_input_length or max_generate_length (sampling_params and eval_sampling_params)",
        )


def _check_modules(key: str, value: Any) -> None:
    if value is None or (isinstance(value, str) and value):
        return
    if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        return
    raise UserError(
        f"{key} names modules", got=value, allowed="all-linear, attention, mlp, a regex, or a list of names"
    )


def _check_sampling(recipe: Recipe) -> None:
    if recipe.generator.sampling_params.temperature == 0:
        raise UserError(
            "generator.sampling_params.temperature=0 samples the same answer each time: nothing to learn from",
            got=0,
            allowed="> 0",
            fix="generator.sampling_params.temperature=1.0",
        )
    for key in ("sampling_params", "eval_sampling_params"):
        if getattr(recipe.generator, key).top_k == 0:
            raise UserError(f"generator.{key}.top_k", got=0, allowed="-1 (off) or >= 1")


def _check_optimizer(recipe: Recipe) -> None:
    betas = recipe.trainer.policy.optimizer_config.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(
            "trainer.policy.optimizer_config.betas", got=betas, allowed="two numbers in [0, 1)", fix="[0.9, 0.999]"
        )


def _check_sweep(recipe: Recipe) -> None:
    assert recipe.sweep is not None
    seeds = recipe.sweep.seeds
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError("sweep.seeds must be different numbers >= 0, at least one", got=seeds)
