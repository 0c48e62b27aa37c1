"""Devices, dtypes and threads of a training process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.schema import Device, DType, Recipe

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


def check_placement(recipe: Recipe) -> None:
    """Raise UserError, saying what was asked and what there is, for a placement this machine or version cannot give."""
    placement, generator = recipe.trainer.placement, recipe.generator
    gpus = visible_gpus()
    asked = placement.policy_num_gpus_per_node * placement.policy_num_nodes
    needs_gpus = placement.device is Device.cuda or (placement.device is Device.auto and asked > 1)
    if needs_gpus and asked > gpus:
        raise UserError(
            "not enough GPUs for trainer.placement",
            got=f"{asked} asked, {gpus} there",
            fix="trainer.placement.policy_num_gpus_per_node=1 generator.num_inference_engines=1 trains in one process"
            + ("" if gpus else "; trainer.placement.device=cpu needs no GPU"),
        )
    processes = {
        "trainer.placement.policy_num_gpus_per_node": placement.policy_num_gpus_per_node,
        "trainer.placement.policy_num_nodes": placement.policy_num_nodes,
        "trainer.placement.ref_num_gpus_per_node": placement.ref_num_gpus_per_node,
        "generator.num_inference_engines": generator.num_inference_engines,
        "generator.inference_engine_tensor_parallel_size": generator.inference_engine_tensor_parallel_size,
    }
    many = {key: value for key, value in processes.items() if value > 1}
    if many or not placement.colocate_all:
        wanted = [f"{key}={value}" for key, value in many.items()]
        raise UserError(
            "this version trains in one process, with its engine inside",
            got=", ".join(wanted or ["trainer.placement.colocate_all=false"]),
            fix=" ".join(f"{key}=1" for key in many) or "trainer.placement.colocate_all=true",
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


def set_threads(recipe: Recipe) -> None:
    """Fix the number of CPU threads: results to the bit depend on it, and Ray's workers would set one."""
    import torch

    if recipe.trainer.num_threads is not None:
        torch.set_num_threads(recipe.trainer.num_threads)
