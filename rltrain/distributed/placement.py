"""Devices, dtypes, threads and determinism of a training process."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from harness.config.schema import Backend, Device, DType, Recipe, SyncMode
from harness.config.validate import engine_lora_rank, num_processes, sync_mode
from harness.core import machine
from harness.core.errors import UserError

if TYPE_CHECKING:
    import torch

OLDEST_DRIVER = {"12": 525, "13": 580}
"""The first NVIDIA driver for each major version of CUDA."""


def visible_gpus() -> int:
    """Return how many GPUs training can use here: 0 with a CPU build of torch. Imports no torch."""
    return machine.present_gpus() if machine.torch_cuda_version() is not None else 0


def needs_workers(recipe: Recipe) -> bool:
    """Return whether a run needs more processes: several ranks, or separate engines."""
    return num_processes(recipe) > 1 or not recipe.trainer.placement.colocate_all


def uses_gpus(recipe: Recipe) -> bool:
    """Return whether training runs on GPUs, as far as this is known without importing torch."""
    device = recipe.trainer.placement.device
    return device is Device.cuda or (
        device is Device.auto and (visible_gpus() > 0 or address_of(recipe) is not None)
    )


def address_of(recipe: Recipe) -> str | None:
    """Return the address of the running Ray cluster to use; None: this machine alone."""
    return recipe.ray.address or os.environ.get("RAY_ADDRESS") or None


def bundles(recipe: Recipe) -> list[dict[str, float]]:
    """Return the CPUs and GPUs of a run: a bundle per node, then one per separate engine."""
    placement, generator = recipe.trainer.placement, recipe.generator
    threads = recipe.trainer.num_threads or 1
    gpus = int(uses_gpus(recipe))
    ranks = placement.policy_num_gpus_per_node
    node = {"CPU": float(threads * ranks), "GPU": float(gpus * ranks)}
    each = generator.inference_engine_tensor_parallel_size
    engine = {"CPU": float(threads * (1 if gpus else each)), "GPU": float(gpus * each)}
    apart = 0 if placement.colocate_all else generator.num_inference_engines
    return [dict(node) for _ in range(placement.policy_num_nodes)] + [
        dict(engine) for _ in range(apart)
    ]


def check_placement(recipe: Recipe) -> None:
    """Raise UserError for a placement that this machine cannot satisfy.

    A cluster is checked when it is reached. A CPU allows any number of processes.
    """
    placement = recipe.trainer.placement
    if address_of(recipe) is not None:
        return
    _check_gpu_software(recipe)
    if placement.policy_num_nodes > 1:
        raise UserError(
            "trainer.placement.policy_num_nodes asks for several machines, and no cluster is named",
            got=f"{placement.policy_num_nodes} asked, 1 there",
            fix="trainer.placement.policy_num_nodes=1, or ray.address=HOST:PORT of a "
            "running Ray cluster",
        )
    present, processes = visible_gpus(), num_processes(recipe)
    # `auto` falls back to the CPU for one process; several are meant for GPUs.
    needs_gpus = placement.device is Device.cuda or (
        placement.device is Device.auto and needs_workers(recipe)
    )
    engines = 0 if placement.colocate_all else recipe.generator.num_inference_engines
    tensor_parallel = recipe.generator.inference_engine_tensor_parallel_size
    asked = processes + engines * tensor_parallel
    if needs_gpus and asked > present:
        each = f" + {engines} engines x {tensor_parallel}" if engines else ""
        raise UserError(
            "not enough GPUs for trainer.placement",
            got=f"{asked} asked ({processes} ranks{each}), {present} there",
            fix="trainer.placement.policy_num_gpus_per_node=1 generator.num_inference_engines=1 "
            "trainer.placement.ref_num_gpus_per_node=null trains in one process"
            + ("" if present else "; trainer.placement.device=cpu needs no GPU"),
        )


def _check_gpu_software(recipe: Recipe) -> None:
    """Raise UserError where torch's build or the driver prevents the use of this machine's GPUs."""
    device, gpus = recipe.trainer.placement.device, machine.present_gpus()
    if device is Device.cpu or not gpus:
        return
    cuda = machine.torch_cuda_version()
    if cuda is None:
        # `auto` trains on the CPU then, with a note (`harness.config.recipe.engine_notes`).
        if device is Device.cuda:
            raise UserError(
                "torch is its CPU build: it cannot use this machine's GPUs",
                got=f"trainer.placement.device=cuda, {gpus} GPUs",
                fix="use the environment that make install-gpu makes, or "
                "trainer.placement.device=cpu",
            )
        return
    driver = machine.driver_version()
    if driver is not None and int(driver.split(".")[0]) < OLDEST_DRIVER.get(cuda.split(".")[0], 0):
        # Only torch can tell: CUDA's forward compatibility package supports older drivers.
        device_of(recipe)


def device_of(recipe: Recipe) -> torch.device:
    """Return the device the policy trains on.

    Raises UserError, with the driver's version, where torch was built for GPUs and cannot use them.
    """
    import torch

    device = recipe.trainer.placement.device
    if device is Device.cpu:
        return torch.device("cpu")
    available = torch.cuda.is_available()
    if not available and (gpus := visible_gpus()):
        cuda = machine.torch_cuda_version() or "unknown"
        oldest = OLDEST_DRIVER.get(cuda.split(".")[0])
        raise UserError(
            "torch cannot use this machine's GPUs",
            got=f"{gpus} GPUs, NVIDIA driver {machine.driver_version() or 'unknown'}, torch "
            f"for CUDA {cuda}",
            allowed=f"driver {oldest} or newer" if oldest else None,
            fix="install a newer driver, or a torch for an older CUDA; "
            "trainer.placement.device=cpu trains without a GPU",
        )
    return torch.device("cuda" if available or device is Device.cuda else "cpu")


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Return the base model's dtype: `auto` is bfloat16 on a GPU, float32 on a CPU."""
    import torch

    dtype = recipe.trainer.policy.model.dtype
    if dtype is DType.auto:
        return torch.float32 if device_of(recipe).type == "cpu" else torch.bfloat16
    return {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}[dtype]


def prepare_process(recipe: Recipe) -> None:
    """Set CPU threads and determinism of a training or engine process.

    Call it before CUDA starts and vLLM is imported. Raises UserError where the GPU cannot do what
    `deterministic: true` requires.
    """
    import torch

    # Results depend on the number of threads, bit by bit, and Ray's workers would set one.
    if recipe.trainer.num_threads is not None:
        torch.set_num_threads(recipe.trainer.num_threads)
    if recipe.deterministic and device_of(recipe).type == "cuda":
        os.environ.update(_deterministic_variables(recipe))
        torch.use_deterministic_algorithms(True)
        # Filling every `torch.empty` costs time, and all of it is written anyway.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        check_batch_invariance(recipe, torch.cuda.get_device_capability())


def deterministic_environment(recipe: Recipe) -> dict[str, str]:
    """Return the variables that `deterministic: true` sets for Ray's processes; none on a CPU."""
    return _deterministic_variables(recipe) if recipe.deterministic and uses_gpus(recipe) else {}


def _deterministic_variables(recipe: Recipe) -> dict[str, str]:
    """Return variables that cuBLAS reads when CUDA starts, and vLLM when it is imported."""
    if recipe.generator.backend is not Backend.vllm:
        return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "VLLM_BATCH_INVARIANT": "1"}
    if recipe.trainer.placement.colocate_all:
        # They disable split K on Hopper and newer. vLLM sets them when its engine starts, but by
        # then the trainer in the same process has multiplied matrices.
        variables |= {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
    return variables


def check_batch_invariance(recipe: Recipe, capability: tuple[int, int]) -> None:
    """Raise UserError where vLLM's batch-invariant kernels do not fit the GPU or placement."""
    if recipe.generator.backend is not Backend.vllm:
        return
    major, minor = capability
    if major < 8:
        raise UserError(
            "vLLM has no batch-invariant kernels for this GPU, which deterministic=true needs",
            got=f"compute capability {major}.{minor}",
            allowed="8.0 or newer",
            fix="deterministic=false, or generator.backend=transformers",
        )
    if major == 8 and recipe.trainer.placement.colocate_all:
        # vLLM replaces aten::linear and aten::matmul in the whole process, without a backward pass.
        raise UserError(
            "vLLM's batch-invariant matrix products for this GPU have no gradients: the "
            "trainer cannot "
            "share a process with them",
            got=f"compute capability {major}.{minor}, deterministic=true",
            allowed="9.0 or newer",
            fix="deterministic=false, trainer.placement.colocate_all=false, or "
            "generator.backend=transformers",
        )


def shares_base(recipe: Recipe) -> bool:
    """Return whether a run can share a pack: it leaves the base and the engine's weights unchanged.

    Dropout needs modules in training mode, shared passes need eval mode.
    """
    lora = recipe.trainer.policy.model.lora
    return lora.rank > 0 and lora.dropout == 0 and sync_mode(lora) is not SyncMode.merge


def pack_key(recipe: Recipe) -> tuple[object, ...]:
    """Return what two runs must have in common to share a base and an engine. Imports no torch."""
    model, generator = recipe.trainer.policy.model, recipe.generator
    lengths = [
        generator.max_input_length,
        generator.sampling_params.max_generate_length,
        generator.eval_sampling_params.max_generate_length,
    ]
    engine = [
        generator.backend,
        generator.gpu_memory_utilization,
        generator.cpu_kv_cache_gb,
        generator.max_num_seqs,
        generator.enforce_eager,
        generator.num_inference_engines,
        generator.inference_engine_tensor_parallel_size,
        json.dumps(generator.engine_args, sort_keys=True),
        recipe.deterministic,
    ]
    rank = 0 if model.lora.rank == 0 else engine_lora_rank(recipe)
    return (
        model.path,
        model.dtype,
        recipe.trainer.placement,
        recipe.trainer.num_threads,
        recipe.trainer.gradient_checkpointing,
        *lengths,
        *engine,
        sync_mode(model.lora),
        rank,
    )
