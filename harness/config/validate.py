"""Rules for the values of a recipe, and settings that follow from several keys."""

from __future__ import annotations

import math
import re
from typing import Any

from harness.config.bounds import check_bounds
from harness.config.expect import check_expectations
from harness.config.plain import LONGEST_NAME
from harness.config.schema import Backend, LoRA, Optimizer, PolicyLoRA, Recipe, Resampling, SyncMode
from harness.core.errors import UserError

# PEFT inits that rewrite the base weights: without its adapter the model is then no reference, and
# the engine has another base.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga", "orthogonal")
INITS = ("kaiming", "gaussian")
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check(recipe: Recipe) -> None:
    """Check every bound and every rule between keys; raises UserError naming the key.

    Settings given under a second name are moved to their first.
    """
    check_bounds(recipe)
    _check_run_name(recipe)
    _merge_names(recipe)
    _check_batches(recipe)
    _check_algorithm(recipe)
    _check_processes(recipe)
    _check_sync(recipe)
    for role in ("policy", "critic"):
        _check_lora(recipe, f"trainer.{role}.model.lora", getattr(recipe.trainer, role).model.lora)
        _check_optimizer(f"trainer.{role}", getattr(recipe.trainer, role).optimizer_config)
    _check_sampling(recipe)
    if recipe.sweep is not None:
        seeds = recipe.sweep.seeds
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise UserError("sweep.seeds must be different numbers >= 0, at least one", got=seeds)
        _check_pruner("sweep.pruner", recipe.sweep.pruner)
    check_expectations(recipe.expect)


def _check_run_name(recipe: Recipe) -> None:
    """Check that the name is that of one directory, and cannot lead out of `trainer.ckpt_path`."""
    name = recipe.trainer.run_name
    if name is None:
        return
    plain = name and not name.startswith(".") and not {"/", "\\"} & set(name) and name.isprintable()
    if not plain or len(name.encode()) > LONGEST_NAME:
        raise UserError(
            "trainer.run_name is the name of one directory, not a path",
            got=ascii(name)[:LONGEST_NAME],
            allowed="printable text without / and \\ that does not begin with a dot, at "
            f"most {LONGEST_NAME} bytes",
            fix="set the parent folder with trainer.ckpt_path",
        )


def _merge_names(recipe: Recipe) -> None:
    """Move settings given by SkyRL's names of seed and max_input_length to ours."""
    trainer = recipe.trainer
    if trainer.seed is not None:
        if recipe.seed not in (0, trainer.seed):
            raise UserError(
                "seed and trainer.seed are the same setting, given twice",
                got=f"seed={recipe.seed}, trainer.seed={trainer.seed}",
                fix="give seed alone",
            )
        recipe.seed, trainer.seed = trainer.seed, None
    if trainer.max_prompt_length is not None:
        recipe.generator.max_input_length, trainer.max_prompt_length = (
            trainer.max_prompt_length,
            None,
        )
    trainer.resume_mode = trainer.resume_mode or "none"


def num_processes(recipe: Recipe) -> int:
    """Return the number of processes that train one run together."""
    placement = recipe.trainer.placement
    return placement.policy_num_gpus_per_node * placement.policy_num_nodes


def _check_batches(recipe: Recipe) -> None:
    trainer = recipe.trainer
    batch = trainer.train_batch_size
    for key in ("policy_mini_batch_size", "critic_mini_batch_size"):
        mini = getattr(trainer, key)
        if mini is not None and (mini > batch or batch % mini):
            raise UserError(
                f"trainer.{key} must divide trainer.train_batch_size (both count prompts)",
                got=f"{key}={mini}, train_batch_size={batch}",
                fix=f"trainer.{key}={math.gcd(batch, mini)}",
            )


def _check_algorithm(recipe: Recipe) -> None:
    algorithm, group = recipe.trainer.algorithm, recipe.generator.n_samples_per_prompt
    kl_keys = [
        f"trainer.algorithm.{key}"
        for key in ("use_kl_loss", "use_kl_in_reward")
        if getattr(algorithm, key)
    ]
    if len(kl_keys) > 1:
        raise UserError(
            "KL goes into the loss or into the reward, not into both",
            got=" and ".join(kl_keys),
            fix="trainer.algorithm.use_kl_in_reward=false",
        )
    if kl_keys and algorithm.kl_loss_coef == 0:
        raise UserError(
            f"{kl_keys[0]} with a coefficient of 0 computes a reference for nothing",
            got="kl_loss_coef=0",
            fix=f"{kl_keys[0]}=false",
        )
    resampling = algorithm.dynamic_sampling.type
    needs_group = {
        "trainer.algorithm.advantage_estimator=rloo": algorithm.advantage_estimator.name == "rloo",
        "trainer.algorithm.zero_variance_filter=true": algorithm.zero_variance_filter,
        f"trainer.algorithm.dynamic_sampling.type={resampling.name}": resampling
        is not Resampling.none,
    }
    for setting, is_set in needs_group.items():
        if is_set and group == 1:
            raise UserError(
                f"{setting} compares the samples of a prompt: it needs several",
                got="generator.n_samples_per_prompt=1",
                allowed=">= 2",
            )


def _check_processes(recipe: Recipe) -> None:
    placement, generator, processes = (
        recipe.trainer.placement,
        recipe.generator,
        num_processes(recipe),
    )
    for key in ("ref_num_gpus_per_node", "critic_num_gpus_per_node"):
        count = getattr(placement, key)
        if count not in (None, placement.policy_num_gpus_per_node):
            raise UserError(
                f"trainer.placement.{key}: reference and critic live in the policy's processes",
                got=f"{count}, with policy_num_gpus_per_node={placement.policy_num_gpus_per_node}",
                fix=f"trainer.placement.{key}=null",
            )
    if generator.backend is Backend.transformers:
        if processes > 1 or not placement.colocate_all:
            raise UserError(
                "generator.backend=transformers samples inside one training process",
                got=f"{processes} processes, colocate_all={placement.colocate_all}".lower(),
                fix="generator.backend=vllm",
            )
        return
    engines, tensor_parallel = (
        generator.num_inference_engines,
        generator.inference_engine_tensor_parallel_size,
    )
    if placement.colocate_all and (engines != processes or tensor_parallel > 1):
        raise UserError(
            "with trainer.placement.colocate_all each training process holds one engine of its own",
            got=f"{processes} processes, generator.num_inference_engines={engines}, "
            f"generator.inference_engine_tensor_parallel_size={tensor_parallel}",
            fix=f"generator.num_inference_engines={processes} "
            "generator.inference_engine_tensor_parallel_size=1, "
            "or trainer.placement.colocate_all=false",
        )


def sync_mode(lora: PolicyLoRA) -> SyncMode:
    """Return how the engine gets a policy: `sync` if set, else the fastest mode that works.

    That is memory; merge without an adapter; disk where a folder for adapter files is named.
    """
    if lora.sync is not None:
        return lora.sync
    if lora.rank == 0:
        return SyncMode.merge
    return SyncMode.disk if lora.lora_sync_path is not None else SyncMode.memory


def _check_sync(recipe: Recipe) -> None:
    lora, limit = recipe.trainer.policy.model.lora, recipe.generator.max_lora_rank
    key = "trainer.policy.model.lora"
    if (
        lora.rank == 0
        and sync_mode(lora) is not SyncMode.merge
        and recipe.generator.backend is Backend.vllm
    ):
        raise UserError(
            f"{key}.rank=0 is full fine-tuning: there is no adapter to send",
            got=f"sync={sync_mode(lora).name}",
            fix=f"{key}.sync=merge",
        )
    # The rank of an adapter to start from is known when it has been read.
    if limit is not None and lora.rank > limit and lora.adapter_path is None:
        raise UserError(
            f"{key}.rank is above generator.max_lora_rank", got=lora.rank, allowed=f"<= {limit}"
        )


def _check_lora(recipe: Recipe, key: str, lora: LoRA) -> None:
    if lora.init_method in BASE_CHANGING_INITS or lora.init_method.startswith(("pissa", "corda")):
        raise UserError(
            f"{key}.init_method changes the base weights: the disabled adapter would be no "
            "reference, "
            "and the engine would sample from another base",
            got=lora.init_method,
            allowed=", ".join(INITS),
        )
    if lora.init_method not in INITS:
        raise UserError(
            f"{key}.init_method is unknown", got=lora.init_method, allowed=", ".join(INITS)
        )
    for name, value in (
        ("target", target_modules(recipe, lora)),
        ("exclude", exclude_modules(recipe, lora)),
    ):
        section = "trainer" if getattr(lora, f"{name}_modules") is None else key
        _check_modules(f"{section}.{name}_modules", value)


def target_modules(recipe: Recipe, lora: LoRA) -> Any:
    """Return the LoRA targets of the policy or critic: its own if set, else the trainer's."""
    return recipe.trainer.target_modules if lora.target_modules is None else lora.target_modules


def exclude_modules(recipe: Recipe, lora: LoRA) -> Any:
    """Return the excluded modules of the policy or critic: its own if set, else the trainer's."""
    return recipe.trainer.exclude_modules if lora.exclude_modules is None else lora.exclude_modules


def engine_lora_rank(recipe: Recipe) -> int:
    """Return the rank that vLLM reserves memory for.

    That is the recipe's limit or the adapter's rank, rounded up to a rank that vLLM serves.
    """
    lowest = recipe.generator.max_lora_rank or recipe.trainer.policy.model.lora.rank
    return next(rank for rank in VLLM_LORA_RANKS if rank >= lowest)


def check_context(recipe: Recipe, limit: int) -> None:
    """Raise UserError when prompt and completion may be longer together than `limit` positions."""
    generator = recipe.generator
    completion = max(
        generator.sampling_params.max_generate_length,
        generator.eval_sampling_params.max_generate_length,
    )
    if generator.max_input_length + completion > limit:
        raise UserError(
            "prompts and completions may be longer than the model's context",
            got=f"generator.max_input_length={generator.max_input_length} + "
            f"max_generate_length={completion}",
            allowed=f"<= {limit} together (max_position_embeddings)",
            fix="lower generator.max_input_length or max_generate_length (sampling_params "
            "and eval_sampling_params)",
        )


def _check_modules(key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except re.error as error:
            raise UserError(
                f"{key} is no regex", got=f"{value}: {error}", fix="or give a list of names"
            ) from None
        return
    if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        return
    raise UserError(
        f"{key} must name modules",
        got=value,
        allowed="all-linear, attention, mlp, a regex, or a list of names",
    )


def _check_sampling(recipe: Recipe) -> None:
    if recipe.generator.sampling_params.temperature == 0:
        raise UserError(
            "generator.sampling_params.temperature=0 samples the same answer each time: "
            "nothing to learn from",
            got=0,
            allowed="> 0",
            fix="generator.sampling_params.temperature=1.0",
        )
    for key in ("sampling_params", "eval_sampling_params"):
        if getattr(recipe.generator, key).top_k == 0:
            raise UserError(f"generator.{key}.top_k", got=0, allowed="-1 (off) or >= 1")


def _check_optimizer(role: str, settings: Optimizer) -> None:
    betas = settings.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(
            f"{role}.optimizer_config.betas",
            got=betas,
            allowed="two numbers in [0, 1)",
            fix="[0.9, 0.999]",
        )


def _check_pruner(key: str, pruner: Any) -> None:
    """Check that a pruner's name, and the name of a pruner that it wraps, is text.

    The sweep checks which pruners there are.
    """
    if not isinstance(pruner, dict):
        return
    if not isinstance(pruner.get("name", ""), str):
        raise UserError(
            f"{key}.name cannot take this value",
            got=pruner["name"],
            allowed="text",
            fix="name: median",
        )
    for name, inner in pruner.items():
        _check_pruner(f"{key}.{name}", inner)
