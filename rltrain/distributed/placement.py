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
    """Return how many NVIDIA GPUs training can use here, without importing torch: none where torch
    is a CPU build.
    """
    return machine.present_gpus() if machine.torch_cuda_version() is not None else 0


def needs_workers(recipe: Recipe) -> bool:
    """Whether a run needs processes besides this one: several ranks, or engines apart from them."""
    return num_processes(recipe) > 1 or not recipe.trainer.placement.colocate_all


def uses_gpus(recipe: Recipe) -> bool:
    """Whether training runs on GPUs, as far as can be told without importing torch."""
    device = recipe.trainer.placement.device
    return device is Device.cuda or (
        device is Device.auto and (visible_gpus() > 0 or address_of(recipe) is not None)
    )


def address_of(recipe: Recipe) -> str | None:
    """The running Ray cluster to use; None: this machine alone."""
    return recipe.ray.address or os.environ.get("RAY_ADDRESS") or None


def bundles(recipe: Recipe) -> list[dict[str, float]]:
    """What a run's processes need: one bundle of CPUs and GPUs per node of ranks, then one per
    engine apart.
    """
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
    """Raise UserError, saying what was asked and what there is, for a placement this machine cannot
    give.

    A cluster is asked when it is reached; a CPU gives any number of processes.
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
    there, processes = visible_gpus(), num_processes(recipe)
    # `auto` falls back to the CPU for one process; several were meant for GPUs.
    wants = placement.device is Device.cuda or (
        placement.device is Device.auto and needs_workers(recipe)
    )
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


def _check_gpu_software(recipe: Recipe) -> None:
    """Raise UserError where this machine has GPUs that torch's build or the driver keeps a recipe
    from using.
    """
    device, there, cuda = (
        recipe.trainer.placement.device,
        machine.present_gpus(),
        machine.torch_cuda_version(),
    )
    if device is Device.cpu or not there:
        return
    if cuda is None:
        # `auto` trains on the CPU then, with a note (`harness.config.recipe.engine_notes`).
        if device is Device.cuda:
            raise UserError(
                "torch is its CPU build: it cannot use this machine's GPUs",
                got=f"trainer.placement.device=cuda, {there} GPUs",
                fix="use the environment that make install-gpu makes, or "
                "trainer.placement.device=cpu",
            )
        return
    driver = machine.driver_version()
    if driver is not None and int(driver.split(".")[0]) < OLDEST_DRIVER.get(cuda.split(".")[0], 0):
        # Only torch can tell: with CUDA's forward compatibility package an older driver does.
        device_of(recipe)


def _unusable_gpus(there: int) -> UserError:
    """The error for GPUs that CUDA cannot use, most often under a driver older than
    torch's CUDA.
    """
    cuda = machine.torch_cuda_version() or "unknown"
    oldest = OLDEST_DRIVER.get(cuda.split(".")[0])
    return UserError(
        "torch cannot use this machine's GPUs",
        got=f"{there} GPUs, NVIDIA driver {machine.driver_version() or 'unknown'}, torch "
        f"for CUDA {cuda}",
        allowed=f"driver {oldest} or newer" if oldest else None,
        fix="install a newer driver, or a torch for an older CUDA; "
        "trainer.placement.device=cpu trains without a GPU",
    )


def device_of(recipe: Recipe) -> torch.device:
    """Return the device the policy trains on.

    Raises UserError, with the driver's version, where there are GPUs that torch was built for and
    cannot use.
    """
    import torch

    wanted = recipe.trainer.placement.device
    if wanted is Device.cpu:
        return torch.device("cpu")
    available = torch.cuda.is_available()
    if not available and (there := visible_gpus()):
        raise _unusable_gpus(there)
    return torch.device("cuda" if available or wanted is Device.cuda else "cpu")


def dtype_of(recipe: Recipe) -> torch.dtype:
    """The base model's dtype: `auto` is bfloat16 on a GPU, float32 on a CPU."""
    import torch

    wanted = recipe.trainer.policy.model.dtype
    if wanted is DType.auto:
        return torch.float32 if device_of(recipe).type == "cpu" else torch.bfloat16
    return {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}[wanted]


def prepare_process(recipe: Recipe) -> None:
    """Set a training or engine process up, before CUDA starts and vLLM is imported: CPU threads and
    determinism.

    Raises UserError where the GPU cannot keep what `deterministic: true` asks for.
    """
    import torch

    # Results to the bit depend on the number of threads, and Ray's workers would set one.
    if recipe.trainer.num_threads is not None:
        torch.set_num_threads(recipe.trainer.num_threads)
    if recipe.deterministic and device_of(recipe).type == "cuda":
        os.environ.update(_deterministic_variables(recipe))
        torch.use_deterministic_algorithms(True)
        # Otherwise every `torch.empty` is filled, to no use where all of it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        check_batch_invariance(recipe, torch.cuda.get_device_capability())


def deterministic_environment(recipe: Recipe) -> dict[str, str]:
    """Return what `deterministic: true` adds to the environment of Ray's processes; {} for a run on
    a CPU.
    """
    return _deterministic_variables(recipe) if recipe.deterministic and uses_gpus(recipe) else {}


def _deterministic_variables(recipe: Recipe) -> dict[str, str]:
    """What must be set before CUDA starts, which is when cuBLAS reads its part, and before vLLM is
    imported.
    """
    if recipe.generator.backend is not Backend.vllm:
        return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "VLLM_BATCH_INVARIANT": "1"}
    if recipe.trainer.placement.colocate_all:
        # Against split K on Hopper and later. vLLM sets them itself when its engine starts: too
        # late in the trainer's process, which has multiplied matrices by then.
        variables |= {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
    return variables


def check_batch_invariance(recipe: Recipe, capability: tuple[int, int]) -> None:
    """Raise UserError where vLLM's batch-invariant kernels do not fit the GPU's compute capability
    or the placement.
    """
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
        # It replaces aten::linear and aten::matmul in the whole process, and those have no backward
        # pass then.
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
    """Whether a run can be a member of a pack of several: it leaves the base and the engine's
    weights as they are.

    Dropout needs modules in training mode, passes that several members share need them out of it.
    """
    lora = recipe.trainer.policy.model.lora
    return lora.rank > 0 and lora.dropout == 0 and sync_mode(lora) is not SyncMode.merge


def pack_key(recipe: Recipe) -> tuple[object, ...]:
    """What two runs must have in common to share a base and an engine, without importing torch."""
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
