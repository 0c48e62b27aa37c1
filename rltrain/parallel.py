"""Devices, dtypes and threads of a training process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.schema import Device, DType, Recipe, SyncMode
from harness.validate import engine_lora_rank, num_processes, sync_mode

if TYPE_CHECKING:
    import torch


def visible_gpus() -> int:
    """NVIDIA GPUs this process may use, counted without importing torch."""
    listed = Path("/proc/driver/nvidia/gpus")
    present = len(list(listed.iterdir())) if listed.is_dir() else 0
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return present
    return min(present, len([d for d in allowed.split(",") if d.strip() not in ("", "-1")]))


def needs_workers(recipe: Recipe) -> bool:
    """Whether a run needs processes besides this one: several ranks, or engines apart from them."""
    return num_processes(recipe) > 1 or not recipe.trainer.placement.colocate_all


def uses_gpus(recipe: Recipe) -> bool:
    """Whether training runs on GPUs, as far as can be told without importing torch."""
    device = recipe.trainer.placement.device
    return device is Device.cuda or (device is Device.auto and (visible_gpus() > 0 or address_of(recipe) is not None))


def address_of(recipe: Recipe) -> str | None:
    """The running Ray cluster to use; None: this machine alone."""
    return recipe.ray.address or os.environ.get("RAY_ADDRESS") or None


def bundles(recipe: Recipe) -> list[dict[str, float]]:
    """What a run's processes need: one bundle of CPUs and GPUs per node of ranks, then one per engine apart."""
    placement, generator = recipe.trainer.placement, recipe.generator
    threads = recipe.trainer.num_threads or 1
    gpus = int(uses_gpus(recipe))
    ranks = placement.policy_num_gpus_per_node
    node = {"CPU": float(threads * ranks), "GPU": float(gpus * ranks)}
    each = generator.inference_engine_tensor_parallel_size
    engine = {"CPU": float(threads * (1 if gpus else each)), "GPU": float(gpus * each)}
    apart = 0 if placement.colocate_all else generator.num_inference_engines
    return [dict(node) for _ in range(placement.policy_num_nodes)] + [dict(engine) for _ in range(apart)]


def check_placement(recipe: Recipe) -> None:
    """Raise UserError, saying what was asked and what there is, for a placement this machine cannot give.

    A cluster is asked when it is reached; a CPU gives any number of processes.
    """
    placement = recipe.trainer.placement
    if address_of(recipe) is not None:
        return
    if placement.policy_num_nodes > 1:
        raise UserError(
            "trainer.placement.policy_num_nodes asks for several machines, and no cluster is named",
            got=f"{placement.policy_num_nodes} asked, 1 there",
            fix="trainer.placement.policy_num_nodes=1, or ray.address=HOST:PORT of a running Ray cluster",
        )
    there, processes = visible_gpus(), num_processes(recipe)
    # `auto` falls back to the CPU for one process; several were meant for GPUs.
    wants = placement.device is Device.cuda or (placement.device is Device.auto and needs_workers(recipe))
    engines = 0 if placement.colocate_all else recipe.generator.num_inference_engines
    tensor_parallel = recipe.generator.inference_engine_tensor_parallel_size
    asked = processes + engines * tensor_parallel
    if wants and asked > there:
        each = f" + {engines} engines x {tensor_parallel}" if engines else ""
        raise UserError(
            "not enough GPUs for trainer.placement",
            got=f"{asked} asked ({processes} ranks{each}), {there} there",
            fix="trainer.placement.policy_num_gpus_per_node=1 generator.num_inference_engines=1 "
            "trainer.placement.ref_num_gpus_per_node=null trains in one process"
            + ("" if there else "; trainer.placement.device=cpu needs no GPU"),
        )


def device_of(recipe: Recipe) -> torch.device:
    """The device the policy trains on."""
    import torch

    if recipe.trainer.placement.device is Device.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(recipe.trainer.placement.device.name)


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The base model's dtype: `auto` is bfloat16 on a GPU, float32 on a CPU."""
    import torch

    wanted = recipe.trainer.policy.model.dtype
    if wanted is DType.auto:
        return torch.float32 if device_of(recipe).type == "cpu" else torch.bfloat16
    return {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}[wanted]


def checkpoints(recipe: Recipe) -> bool:
    """Whether layers keep their input only and compute the rest again in the backward pass: `auto` is on a GPU."""
    wanted = recipe.trainer.gradient_checkpointing
    return device_of(recipe).type == "cuda" if wanted == "auto" else bool(wanted)


def set_threads(recipe: Recipe) -> None:
    """Fix the number of CPU threads: results to the bit depend on it, and Ray's workers would set one."""
    import torch

    if recipe.trainer.num_threads is not None:
        torch.set_num_threads(recipe.trainer.num_threads)


def shares_base(recipe: Recipe) -> bool:
    """Whether a run can be a member of a pack of several: it leaves the base and the engine's weights as they are.

    Dropout needs modules in training mode, passes that several members share need them out of it.
    """
    lora = recipe.trainer.policy.model.lora
    return lora.rank > 0 and lora.dropout == 0 and sync_mode(lora) is not SyncMode.merge


def pack_key(recipe: Recipe) -> tuple[object, ...]:
    """What two runs must have in common to share a base and an engine, without importing torch."""
    model, generator = recipe.trainer.policy.model, recipe.generator
    lengths = [generator.max_input_length, generator.sampling_params.max_generate_length,
               generator.eval_sampling_params.max_generate_length]  # fmt: skip
    engine = [generator.backend, generator.gpu_memory_utilization, generator.cpu_kv_cache_gb, generator.max_num_seqs,
              generator.enforce_eager, generator.num_inference_engines,
              generator.inference_engine_tensor_parallel_size]  # fmt: skip
    rank = 0 if model.lora.rank == 0 else engine_lora_rank(recipe)
    return (model.path, model.dtype, recipe.trainer.placement, recipe.trainer.num_threads,
            recipe.trainer.gradient_checkpointing,
            *lengths, *engine, sync_mode(model.lora), rank)  # fmt: skip
