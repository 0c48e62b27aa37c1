"""Find out what a run was, from its resolved recipe, its manifest and its weights."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from analysis.data.records import Record, check_inside, lookup
from harness.config import advice
from harness.config.digest import YOUNGER
from harness.config.recipe_keys import flatten
from harness.config.shapes import shape_of, training_flops
from harness.core.errors import UserError
from harness.core.paths import locate
from harness.records.run_dir import RunDir, Status

# Keys that the claims vary, or that do not change a run's outcome. Runs that differ in these alone
# are comparable.
_VARIED = (
    "seed",
    "deterministic",
    "sweep",
    "expect",
    "ray",
    "trainer.seed",
    "trainer.gradient_checkpointing",
    "trainer.policy.model.lora.rank",
    "trainer.policy.model.lora.expert_rank",
    "trainer.policy.model.lora.alpha",
    "trainer.policy.optimizer_config.lr",
    "trainer.target_modules",
    "trainer.policy.model.lora.target_modules",
    "trainer.train_batch_size",
    "trainer.policy_mini_batch_size",
    "trainer.critic_mini_batch_size",
    "trainer.max_steps",
    "trainer.epochs",
    "trainer.policy.model.lora.sync",
    "trainer.policy.model.lora.lora_sync_path",
    "trainer.strategy",
    "trainer.placement",
    "trainer.num_threads",
    "trainer.micro_forward_batch_size_per_gpu",
    "trainer.micro_train_batch_size_per_gpu",
    "trainer.max_tokens_per_microbatch",
    "trainer.ckpt_interval",
    "trainer.ckpt_path",
    "trainer.resume_mode",
    "trainer.max_ckpts_to_keep",
    "trainer.eval_interval",
    "trainer.eval_batch_size",
    "trainer.samples_per_dump",
    "trainer.logger",
    "trainer.project_name",
    "trainer.run_name",
    "trainer.sync_tolerance",
    "trainer.max_bad_steps",
    "generator.max_lora_rank",
    "generator.num_inference_engines",
    "generator.inference_engine_tensor_parallel_size",
    "generator.gpu_memory_utilization",
    "generator.cpu_kv_cache_gb",
    "generator.enforce_eager",
    "generator.max_num_seqs",
    "generator.batched",
)
_NON_FINITE = re.compile(r"non-finite|\bnan\b|\binf\b", re.IGNORECASE)
_HEADER_LIMIT = 100_000_000
_LORA = "trainer.policy.model.lora"
_MODULE_SETS = {
    name: frozenset(advice.adapted_modules(name, None))
    for name in ("all-linear", "attention", "mlp")
}


def run_facts(directory: Path, record: Record, metric: str, maximize: bool) -> dict[str, Any]:
    """Return a run's settings, sizes and context as columns of its row; None for what is unknown.

    `parameters` counts the trained ones, `model_parameters` the base model's; `batch_size` is in
    sequences per optimizer step. `context` is a digest of everything that the claims do not vary:
    runs are comparable when it is equal.
    """
    recipe = record.recipe
    rank = _int(lookup(recipe, f"{_LORA}.rank"))
    path = lookup(recipe, "trainer.policy.model.path")
    config = advice.stored_config(path) if isinstance(path, str) else {}
    modules = _adapted_modules(recipe)
    folder = locate(path) if isinstance(path, str) else None
    weights = sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else []
    model_parameters = _stored_parameters(tuple(weights))
    shape = shape_of(path) if isinstance(path, str) else None
    active_parameters = model_parameters
    if shape is not None and shape.experts > 1:
        active_parameters = shape.active_parameters
    group = _int(lookup(recipe, "generator.n_samples_per_prompt"))
    mini, batch = (
        _int(lookup(recipe, f"trainer.{name}"))
        for name in ("policy_mini_batch_size", "train_batch_size")
    )
    steps = _int(lookup(recipe, "trainer.max_steps"))
    budget = f"{steps} steps" if steps else f"{lookup(recipe, 'trainer.epochs')} epochs"
    run = RunDir(directory / record.run_dir)
    return {
        "rank": rank,
        "full": None if rank is None else rank == 0,
        "alpha": lookup(recipe, f"{_LORA}.alpha") if rank else None,
        "lr": lookup(recipe, "trainer.policy.optimizer_config.lr"),
        "targets": _module_set(modules) if rank else None,
        "batch_size": None if mini is None or group is None else mini * group,
        "episodes_per_step": None if batch is None or group is None else batch * group,
        "budget": budget if recipe else None,
        "parameters": _trained_parameters(run, rank, path, modules, model_parameters),
        "model_parameters": model_parameters,
        "model": path,
        "model_type": config.get("model_type"),
        "hidden_size": config.get("hidden_size"),
        "rule_lr": advice.rule_learning_rate(config),
        "diverged": _diverged(record, metric, maximize),
        "context": _context(recipe, record.manifest, metric) if recipe else None,
        "source": (record.manifest.get("recipe") or {}).get("source"),
        "flops_per_token": _flops_per_token(recipe, rank, active_parameters),
    }


def _context(recipe: dict[str, Any], manifest: dict[str, Any], metric: str) -> str:
    # Model and data count by content where that is known: the same files may lie elsewhere.
    digest, data = (manifest.get("model") or {}).get("digest"), manifest.get("data") or {}
    inputs: dict[str, Any] = {"model": digest, "data": sorted(map(str, data.values()))}
    sections = list(_VARIED)
    sections += ["trainer.policy.model.path"] if digest else []
    sections += ["data"] if data and all(data.values()) else []
    kept = {
        key: value
        for key, value in flatten(recipe)
        if not any(key == section or key.startswith(f"{section}.") for section in sections)
        and value not in YOUNGER.get(key, ())
    }
    text = json.dumps([metric, kept, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _diverged(record: Record, metric: str, maximize: bool) -> bool:
    """Return whether a run failed on non-finite numbers or ended far worse than the base.

    Far worse is below half of the base's score, or above twice of it for a loss.
    """
    reason = record.reason or ""
    # A failed reward quotes the completion, which may hold any words.
    quotes = reason.startswith("the reward of ")
    if record.status == Status.FAILED.value and _NON_FINITE.search(reason) and not quotes:
        return True
    scores = [(row["step"], row[metric]) for row in record.rows if metric in row]
    logged = [(step, score) for step, score in scores if score == score]
    if len(logged) < 2 or logged[0][0] != 0:
        return False
    base, last = logged[0][1], logged[-1][1]
    return base > 0 and (last < base / 2 if maximize else last > base * 2)


def _adapted_modules(recipe: dict[str, Any]) -> frozenset[str]:
    values = []
    for name in ("target_modules", "exclude_modules"):
        adapter = lookup(recipe, f"{_LORA}.{name}")
        values.append(lookup(recipe, f"trainer.{name}") if adapter is None else adapter)
    try:
        return frozenset(advice.adapted_modules(*values))
    except TypeError:
        return frozenset()


def _module_set(modules: frozenset[str]) -> str | None:
    """Return the usual name of a set of adapted modules, else its members."""
    name = next((name for name, members in _MODULE_SETS.items() if members == modules), None)
    return name or ", ".join(sorted(modules)) or None


def _trained_parameters(
    run: RunDir, rank: int | None, path: Any, modules: frozenset[str], model: int | None
) -> int | None:
    """Count the trained parameters: the stored adapter's, else by the model's shape."""
    if rank is None:
        return None
    if rank == 0:
        return model
    files = [run.adapter / name / "adapter_model.safetensors" for name in ("final", "best")]
    written = next((file for file in files if file.is_file()), None)
    try:
        if written is not None:
            check_inside(run, written)
            return _stored_parameters((written,))
    except UserError:
        pass
    shape = shape_of(path) if isinstance(path, str) else None
    return shape.adapter_parameters(rank, sorted(modules)) if shape is not None else None


@cache
def _stored_parameters(files: tuple[Path, ...]) -> int | None:
    """Count the numbers in safetensors files by their headers; None for no or a damaged file."""
    total = 0
    for path in files:
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(size, _HEADER_LIMIT)))
            tensors = (entry for name, entry in header.items() if name != "__metadata__")
            total += sum(prod(entry["shape"]) for entry in tensors)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
            return None
    return total or None


def _flops_per_token(
    recipe: dict[str, Any], rank: int | None, parameters: int | None
) -> float | None:
    if rank is None or not parameters:
        return None
    epochs = _int(lookup(recipe, "trainer.update_epochs_per_batch")) or 1
    batch = _int(lookup(recipe, "trainer.train_batch_size")) or 1
    mini = _int(lookup(recipe, "trainer.policy_mini_batch_size")) or 1
    in_loss, in_reward, estimator = (
        lookup(recipe, f"trainer.algorithm.{name}")
        for name in ("use_kl_loss", "use_kl_in_reward", "advantage_estimator")
    )
    dropout = lookup(recipe, f"{_LORA}.dropout") or 0
    old_logprobs = epochs > 1 or batch > mini or dropout > 0 or bool(in_reward)
    reference, critic = bool(in_loss or in_reward), estimator == "gae"
    flops = training_flops(
        parameters, forwards=1 + old_logprobs + reference, updates=epochs, full=rank == 0
    )
    if critic:
        full = lookup(recipe, "trainer.critic.model.lora.rank") == 0
        flops += training_flops(parameters, forwards=1, updates=epochs, full=full)
    return flops


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
