"""State of the process that vLLM reads when it starts, and state that it must not change."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from vllm.config import vllm as vllm_defaults

from harness.core.errors import UserError
from rltrain.engines import vllm_gpu


def executor_backend(tensor_parallel_size: int) -> str:
    """Return where vLLM's workers run: in this process, in their own, or as one of several ranks.

    It is always named, because inside Ray vLLM may choose Ray, which needs a placement group of its
    own. Raises UserError for a split engine inside each of several ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        if tensor_parallel_size > 1:
            raise UserError(
                "an engine inside each of several training ranks cannot be split",
                got=f"generator.inference_engine_tensor_parallel_size={tensor_parallel_size}",
                fix="set it to 1, or trainer.placement.colocate_all=false",
            )
        return "external_launcher"
    return "uni" if tensor_parallel_size == 1 else "mp"


def set_environment(cpu_kv_cache_gb: int | None) -> None:
    """Set the variables that vLLM reads when it starts.

    Its engine core runs in this process and sends no usage report. `cpu_kv_cache_gb` is the size of
    the KV cache on a CPU; None on a GPU.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    if cpu_kv_cache_gb is not None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_kv_cache_gb)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        return
    vllm_gpu.claim_cache_root()
    # Model runner 1 launches one sampling kernel per sequence that has a seed, runner 2 one for
    # all. vLLM 0.32 uses runner 2 wherever it can; 0.24 only for some architectures, without
    # Qwen2's, though it supports what we need (LoRA, sleep, processed log-probabilities) for others
    # too. It refuses by name a model that it cannot serve. A user's
    # VLLM_USE_V2_MODEL_RUNNER=0 stays.
    if hasattr(vllm_defaults, "DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES"):
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")


@contextlib.contextmanager
def without_torch_determinism() -> Iterator[None]:
    """Disable torch's deterministic kernels inside the block.

    vLLM has its own switch, VLLM_BATCH_INVARIANT, and is tested with that alone.
    """
    enabled, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)


@contextlib.contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the process's random generators afterwards: vLLM seeds and uses them."""
    state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002


@contextlib.contextmanager
def preserve_process_state() -> Iterator[None]:
    """Restore process state afterwards that vLLM changes when it starts.

    On a CPU it disables torch.set_num_threads and changes the environment of child processes. vLLM
    0.24 with batch-invariant kernels replaces torch.bmm by a function without a gradient; its
    kernel under the dispatcher stays.
    """
    set_num_threads, threads, bmm = torch.set_num_threads, torch.get_num_threads(), torch.bmm
    before = {
        name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    }
    try:
        with preserve_random_state():
            yield
    finally:
        torch.set_num_threads, torch.bmm = set_num_threads, bmm
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def preserve_classes(model: Any) -> Iterator[None]:
    """Restore the classes of the trainer's model afterwards, where it is in this process.

    For a model that vLLM has no class of its own for (OLMo 2, SmolLM3) it changes transformers',
    whose objects then expect to be vLLM's when they are called. vLLM's own, warmed up by then, is
    served without compilation.
    """
    modules = () if model is None else model.modules()
    before = {
        kind: {name: getattr(kind, name) for name in ("__bases__", "__init__", "__call__")}
        for module in modules
        for kind in type(module).__mro__  # FSDP puts its own class in front
        if issubclass(kind, torch.nn.Module)
    }
    try:
        yield
    finally:
        for kind, attributes in before.items():
            if kind.__bases__ != attributes["__bases__"]:
                for name, value in attributes.items():
                    setattr(kind, name, value)
