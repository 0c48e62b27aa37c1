"""vLLM's settings on GPUs. Imports no vllm."""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path
from typing import IO, Any

from harness.config.schema import Recipe
from harness.config.shapes import shape_from
from harness.core.errors import UserError

WORKER = "rltrain.engines.vllm_worker.Worker"

GIB = 2**30
LEAST_LEFT = GIB // 2
"""Bytes of a GPU that vLLM is never offered (or 2% of all): CUDA and NCCL allocate before it."""

_cache_root: IO[str] | None = None
"""The lock on this process's part of vLLM's cache, held until the process ends."""


def gpu_settings(recipe: Recipe, *, free: int, total: int, least: int) -> dict[str, Any]:
    """Return arguments of `vllm.LLM` for a GPU with `free` of `total` bytes available.

    Raises UserError where vLLM would get less than the `least` bytes that it needs.
    """
    settings = {
        "gpu_memory_utilization": memory_share(
            recipe.generator.gpu_memory_utilization, free, total, least
        ),
        "worker_cls": WORKER,
    }
    if not recipe.generator.enforce_eager:
        # By vLLM's default `cudagraph_specialize_lora` each size is captured twice: without
        # adapters, and with room for all of them.
        sizes = capture_sizes(recipe.generator.max_num_seqs)
        settings["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    if recipe.deterministic:
        # Asynchronously, timing decides which requests are decoded together.
        settings["async_scheduling"] = False
    return settings


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to capture CUDA graphs for, up to and including `max_num_seqs`.

    vLLM's default sizes end at 512 and skip a maximum between two steps, which then decodes without
    a graph.
    """
    steps = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, max_num_seqs, 64)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


def memory_share(asked: float, free: int, total: int, least: int) -> float:
    """Return the share of a GPU's `total` bytes to request: `asked`, or less where less is `free`.

    vLLM refuses to start when it requests more than is free, and the trainer's model is on the same
    GPU. Raises UserError when the share is less than the `least` bytes that one sequence needs.
    """
    spare = free - max(LEAST_LEFT, total // 50)
    share = min(asked, max(spare, 0) / total)
    if share * total < max(least, 1):
        raise UserError(
            "too little of the GPU's memory is left for vLLM",
            got=f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free beside the trainer's "
            "model and other processes; "
            f"generator.gpu_memory_utilization={asked:g} allows {asked * total / GIB:.1f}",
            allowed=f">= {least / GIB:.1f} GiB for vLLM: its copy of the model, and keys "
            "and values of one sequence",
            fix="end other processes on the GPU, raise generator.gpu_memory_utilization, "
            "use a smaller model, or give "
            "engines GPUs of their own with trainer.placement.colocate_all=false",
        )
    return share


def least_bytes(model: Any, dtype_bytes: int, max_model_len: int) -> int:
    """Return the bytes that an engine needs to serve one sequence of `max_model_len` tokens.

    These are its copy of the weights, and keys and values. 0 where the trainer's model is in
    another process.
    """
    if model is None:
        return 0
    weights = int(sum(parameter.numel() for parameter in model.parameters()) * dtype_bytes)
    shape = shape_from(model.config.to_dict())
    return weights + (
        max_model_len * shape.cache_bytes_per_token(dtype_bytes) if shape is not None else 0
    )


def claim_cache_root() -> None:
    """Point `VLLM_CACHE_ROOT` at a folder that no other process uses while this one lives.

    Processes that compile at the same time would otherwise write into one folder. The folders are
    numbered and reused by later processes, which find compiled code there. A root that the user set
    stays, and so does vLLM's default where a folder cannot be made or locked.
    """
    global _cache_root
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm" / "noregret"
    inherited = os.environ.get("VLLM_CACHE_ROOT")
    # A folder below `home` was set by a parent process, not by the user.
    if _cache_root is not None or (inherited and Path(inherited).parent != home):
        return
    for number in itertools.count():
        folder = home / str(number)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("w")
        except OSError:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        except OSError:
            lock.close()
            return
        else:
            os.environ["VLLM_CACHE_ROOT"], _cache_root = str(folder), lock
            return
