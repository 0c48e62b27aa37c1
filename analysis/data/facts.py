"""What one run was, from its resolved recipe, its manifest and the weights it wrote; never from
names.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from analysis.data.records import Record, check_own, lookup
from harness.config import advice
from harness.config.shapes import shape_of
from harness.core.errors import UserError
from harness.core.paths import locate
from harness.records.run_dir import RunDir, Status

# What the claims vary, and what has no part in a run's outcome: two runs that differ in these alone
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
_MODULE_SETS = {
    name: frozenset(advice.adapted_modules(name, None))
    for name in ("all-linear", "attention", "mlp")
}


def facts(directory: Path, record: Record, metric: str, maximize: bool) -> dict[str, Any]:
    """A run's settings, sizes and context as one row's columns; what is not known is None.

    `parameters` are those trained, `model_parameters` the base's; `batch_size` sequences an
    optimizer step; `context` a digest that equal experiments share which differ only in what the
    claims vary.
    """
    run = RunDir(directory / record.run_dir)
    recipe = record.recipe
    rank, lora = _int(lookup(recipe, "trainer.policy.model.lora.rank")), "trainer.policy.model.lora"
    path = lookup(recipe, "trainer.policy.model.path")
    config = advice.stored_config(path) if isinstance(path, str) else {}
    modules = _modules(recipe)
    model_parameters = _stored_parameters(_model_files(path))
    group = _int(lookup(recipe, "generator.n_samples_per_prompt"))
    steps = _int(lookup(recipe, "trainer.max_steps"))
    budget = f"{steps} steps" if steps else f"{lookup(recipe, 'trainer.epochs')} epochs"
    return {
        "rank": rank,
        "full": None if rank is None else rank == 0,
        "alpha": lookup(recipe, f"{lora}.alpha") if rank else None,
        "lr": lookup(recipe, "trainer.policy.optimizer_config.lr"),
        "targets": _named(modules) if rank else None,
        "batch_size": _product(_int(lookup(recipe, "trainer.policy_mini_batch_size")), group),
        "episodes_per_step": _product(_int(lookup(recipe, "trainer.train_batch_size")), group),
        "budget": budget if recipe else None,
        "parameters": _trained(run, rank, path, modules, model_parameters),
        "model_parameters": model_parameters,
        "model": path,
        "model_type": config.get("model_type"),
        "hidden_size": config.get("hidden_size"),
        "rule_lr": advice.rule_learning_rate(config),
        "diverged": _diverged(record, metric, maximize),
        "context": _context(recipe, record.manifest, metric) if recipe else None,
        "source": (record.manifest.get("recipe") or {}).get("source"),
        "flops_per_token": _flops_per_token(recipe, rank, model_parameters),
    }


def _context(recipe: dict[str, Any], manifest: dict[str, Any], metric: str) -> str:
    kept = {
        key: value
        for key, value in _leaves(recipe)
        if not any(_within(key, varied) for varied in _VARIED)
    }
    # By content where that is known: the same files may lie elsewhere.
    digest, data = (manifest.get("model") or {}).get("digest"), manifest.get("data") or {}
    inputs: dict[str, Any] = {"model": digest, "data": sorted(map(str, data.values()))}
    known = (["trainer.policy.model.path"] if digest else []) + (
        ["data"] if data and all(data.values()) else []
    )
    kept = {
        key: value for key, value in kept.items() if not any(_within(key, name) for name in known)
    }
    text = json.dumps([metric, kept, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _within(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _diverged(record: Record, metric: str, maximize: bool) -> bool:
    """Whether the run failed on non-finite numbers, or ended with less than half (a loss: twice)
    the base's score.
    """
    reason = record.reason or ""
    # What a reward could not score is quoted there, whatever words it has.
    if (
        record.status == Status.FAILED.value
        and _NON_FINITE.search(reason)
        and not reason.startswith("the reward of ")
    ):
        return True
    logged = [
        (row["step"], row[metric])
        for row in record.rows
        if metric in row and row[metric] == row[metric]
    ]
    if len(logged) < 2 or logged[0][0] != 0:
        return False
    base, last = logged[0][1], logged[-1][1]
    return base > 0 and (last < base / 2 if maximize else last > base * 2)


def _modules(recipe: dict[str, Any]) -> frozenset[str]:
    lora = "trainer.policy.model.lora"
    own, excluded = (
        lookup(recipe, f"{lora}.target_modules"),
        lookup(recipe, f"{lora}.exclude_modules"),
    )
    targets = lookup(recipe, "trainer.target_modules") if own is None else own
    left_out = lookup(recipe, "trainer.exclude_modules") if excluded is None else excluded
    try:
        return frozenset(advice.adapted_modules(targets, left_out))
    except TypeError:
        return frozenset()


def _named(modules: frozenset[str]) -> str | None:
    """A set of adapted modules by its usual name, else by its members."""
    name = next((name for name, members in _MODULE_SETS.items() if members == modules), None)
    return name or ", ".join(sorted(modules)) or None


def _trained(
    run: RunDir, rank: int | None, path: Any, modules: frozenset[str], model: int | None
) -> int | None:
    """Trained parameters: of the adapter as written, else by the model's shape; a full run trains
    all.
    """
    if rank is None:
        return None
    if rank == 0:
        return model
    files = [run.adapter / name / "adapter_model.safetensors" for name in ("final", "best")]
    written = next((file for file in files if file.is_file()), None)
    try:
        if written is not None:
            check_own(run, written)
            return _stored_parameters((written,))
    except UserError:
        pass
    shape = shape_of(path) if isinstance(path, str) else None
    return shape.adapter_parameters(rank, sorted(modules)) if shape is not None else None


def _model_files(path: Any) -> tuple[Path, ...]:
    found = locate(path) if isinstance(path, str) else None
    return (
        tuple(sorted(found.glob("*.safetensors"))) if found is not None and found.is_dir() else ()
    )


@cache
def _stored_parameters(files: tuple[Path, ...]) -> int | None:
    """Numbers stored in safetensors files, from their headers alone; None without a file or with a
    damaged one.
    """
    total = 0
    for path in files:
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(size, _HEADER_LIMIT)))
            total += sum(
                prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
            return None
    return total or None


def _flops_per_token(
    recipe: dict[str, Any], rank: int | None, parameters: int | None
) -> float | None:
    """Model FLOPs a trained token costs: sampling, other forward passes, and forward and backward
    of each epoch.

    2 a parameter forward, 2 backward for activations and, in full fine-tuning, 2 for weights
    (Kaplan et al. 2020, section 2.1); attention and the adapter's own are left out, as in
    `perf/mfu`.
    """
    if rank is None or not parameters:
        return None
    epochs = _int(lookup(recipe, "trainer.update_epochs_per_batch")) or 1
    batch, mini = (
        _int(lookup(recipe, f"trainer.{name}"))
        for name in ("train_batch_size", "policy_mini_batch_size")
    )
    algorithm = "trainer.algorithm"
    penalised = [
        bool(lookup(recipe, f"{algorithm}.{name}")) for name in ("use_kl_loss", "use_kl_in_reward")
    ]
    several = epochs > 1 or (batch or 1) > (mini or 1) or penalised[1]
    forwards = (
        int(several)
        + int(any(penalised))
        + int(lookup(recipe, f"{algorithm}.advantage_estimator") == "gae")
    )
    return float(parameters) * (2 + 2 * forwards + epochs * (6 if rank == 0 else 4))


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _product(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return prod(known) if len(known) == len(values) else None
