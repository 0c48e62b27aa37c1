"""Settings of vLLM that are for GPUs alone. Imports no vllm."""

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
"""Bytes of a GPU that vLLM is never offered, or a fiftieth of them all: CUDA and NCCL take some
before it looks.
"""

_cache_root: IO[str] | None = None
"""The lock on this process's own part of vLLM's cache: held, and so open, for as long as the
process lives.
"""


def gpu_settings(recipe: Recipe, *, free: int, total: int, least: int) -> dict[str, Any]:
    """Return arguments of `vllm.LLM` for a GPU with `free` of `total` bytes left, of which it needs
    `least`.

    Raises UserError where less than that is left for it.
    """
    settings = {
        "gpu_memory_utilization": memory_share(
            recipe.generator.gpu_memory_utilization, free, total, least
        ),
        "worker_cls": WORKER,
    }
    if not recipe.generator.enforce_eager:
        # Graphs are captured twice for each size, without adapters and with room for all of them:
        # vLLM's default `cudagraph_specialize_lora`, which serves packs of any members and the
        # plain base model.
        sizes = capture_sizes(recipe.generator.max_num_seqs)
        settings["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    if recipe.deterministic:
        # Otherwise which requests are decoded together depends on how soon the last step's results
        # arrive.
        settings["async_scheduling"] = False
    return settings


def capture_sizes(max_num_seqs: int) -> list[int]:
    """Return the batch sizes to capture CUDA graphs for: up to `max_num_seqs`, that one included.

    vLLM's own steps end at 512 and leave out a size between two steps, which then decodes without
    its graph.
    """
    steps = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, max_num_seqs, 64)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


def memory_share(asked: float, free: int, total: int, least: int) -> float:
    """Return the share of a GPU's `total` bytes to ask for: `asked`, or less where less of it is
    `free`.

    vLLM refuses to start when more than what is free is asked for, and the trainer's model lies on
    the same GPU. Raises UserError when the share is less than the `least` bytes that one sequence
    needs.
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
            "take a smaller model, or give "
            "engines GPUs of their own with trainer.placement.colocate_all=false",
        )
    return share


def least_bytes(model: Any, dtype_bytes: int, max_model_len: int) -> int:
    """Return the bytes that an engine needs to serve one sequence of `max_model_len` tokens beside
    the trainer's model: its own copy of the weights, and keys and values. 0 where the trainer's
    model is in another process.
    """
    if model is None:
        return 0
    weights = int(sum(parameter.numel() for parameter in model.parameters()) * dtype_bytes)
    shape = shape_from(model.config.to_dict())
    return weights + (
        max_model_len * shape.cache_bytes_per_token(dtype_bytes) if shape is not None else 0
    )


def claim_cache_root() -> None:
    """Point `VLLM_CACHE_ROOT` at a part of vLLM's cache that no other process uses while this one
    lives.

    Processes that compile at the same time would otherwise write into one folder. The parts are
    numbered and taken again by later processes, which find there what was compiled. A root that the
    user set stays, and so does vLLM's own where a part cannot be made or locked.
    """
    global _cache_root
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm" / "noregret"
    given = os.environ.get("VLLM_CACHE_ROOT")
    # A parent process's part, inherited, is not the user's wish.
    if _cache_root is not None or (given and Path(given).parent != home):
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
