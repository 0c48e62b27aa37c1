"""Test vLLM's GPU settings and calls without a GPU, against the installed vLLM."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.config import CompilationConfig
from vllm.config import vllm as vllm_defaults
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker import gpu_worker

from harness.config.schema import Recipe
from harness.core.errors import UserError
from rltrain.distributed import placement as parallel
from rltrain.engines import remote, vllm_gpu
from rltrain.engines import vllm as engines
from rltrain.engines.base import EngineOptions
from rltrain.engines.vllm_extension import WorkerExtension
from rltrain.engines.vllm_worker import Worker
from tests.recipes import quickstart

GIB = 2**30
Start = Callable[..., tuple[engines.VLLMEngine, dict[str, Any]]]


@pytest.fixture
def calls() -> list[str]:
    """Return a list to which calls are added in order."""
    return []


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> Iterator[Start]:
    """Return a function that starts an engine on a fake GPU of 80 GiB, 70 of them free.

    It also returns the arguments that vLLM got.
    """
    passed: dict[str, Any] = {}

    def called(name: str) -> Callable[..., None]:
        return lambda *_, **__: calls.append(name)

    class LLM:
        def __init__(self, **settings: Any) -> None:
            passed.update(settings, deterministic=torch.are_deterministic_algorithms_enabled())
            setattr(torch, "bmm", torch.matmul)  # noqa: B010 as 0.24 does with batch-invariant kernels
            self.llm_engine = SimpleNamespace(sleep=called("sleep"), wake_up=called("wake"))

    monkeypatch.setattr(vllm, "LLM", LLM)
    monkeypatch.setattr(torch, "bmm", torch.bmm)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", called("empty_cache"))
    monkeypatch.setattr(torch.cuda, "synchronize", called("synchronize"))
    monkeypatch.setattr(gc, "collect", called("collect"))
    monkeypatch.setattr(vllm_gpu, "claim_cache_root", called("cache"))
    monkeypatch.setattr(os, "environ", dict(os.environ))  # restores vLLM's variables after the test
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)

    def make(*overrides: str, on_cpu: bool = False) -> tuple[engines.VLLMEngine, dict[str, Any]]:
        options = EngineOptions("model", torch.bfloat16, (1,), max_lora_rank=8, max_loras=4)
        return engines.VLLMEngine(quickstart(overrides), options, on_cpu), passed

    yield make
    torch.use_deterministic_algorithms(False)


def test_memory_is_released_before_vllm_sleeps_and_wakes(start: Start, calls: list[str]) -> None:
    engine, passed = start()
    assert passed["enable_sleep_mode"]
    assert calls == ["cache", "collect", "empty_cache"]  # before free memory is read
    calls.clear()
    engine.sleep()
    engine.wake()
    assert calls == ["synchronize", "sleep", "collect", "empty_cache", "wake"]


@pytest.mark.parametrize(
    ("overrides", "on_cpu"), [((), True), (("trainer.placement.colocate_all=false",), False)]
)
def test_engines_that_need_not_sleep_do_nothing(
    start: Start, calls: list[str], overrides: tuple[str, ...], on_cpu: bool
) -> None:
    engine, _ = start(*overrides, on_cpu=on_cpu)
    calls.clear()
    engine.sleep()
    engine.wake()
    assert not calls


@pytest.mark.parametrize(
    ("asked", "on_cpu", "eager"),
    [("null", False, False), ("null", True, True), ("true", False, True), ("false", True, False)],
)
def test_graphs_are_for_gpus(start: Start, asked: str, on_cpu: bool, eager: bool) -> None:
    _, passed = start(f"generator.enforce_eager={asked}", on_cpu=on_cpu)
    assert passed["enforce_eager"] is eager
    assert ("compilation_config" in passed) is (not on_cpu and not eager)


def test_gpu_settings_are_accepted_by_this_vllm(start: Start) -> None:
    _, passed = start("generator.max_num_seqs=100", "deterministic=true")
    passed.pop("deterministic")
    assert passed.keys() <= set(EngineArgs.__dataclass_fields__)
    sizes = passed["compilation_config"]["cudagraph_capture_sizes"]
    config = CompilationConfig(**passed["compilation_config"])
    assert config.cudagraph_capture_sizes == sizes
    assert sizes[-1] == 100
    assert config.cudagraph_specialize_lora
    assert "kv_cache_memory_bytes" not in passed
    assert passed["worker_cls"] == f"{Worker.__module__}.{Worker.__name__}"


def test_the_users_arguments_take_precedence(start: Start) -> None:
    _, passed = start(
        "generator.engine_args={max_num_batched_tokens: 777, compilation_config: {mode: 0}}",
        on_cpu=True,
    )
    assert passed["max_num_batched_tokens"] == 777
    _, passed = start("generator.engine_args={compilation_config: {mode: 0}}")
    assert passed["compilation_config"] == {"mode": 0}
    with pytest.raises(UserError, match="set generator.max_num_seqs"):
        start("generator.engine_args={max_num_seqs: 3}")


def test_too_little_memory_is_reported_before_vllm_starts(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB // 2, 80 * GIB))
    with pytest.raises(UserError, match="too little of the GPU's memory"):
        start()


@pytest.mark.parametrize("of_some", [True, False])
def test_the_second_model_runner_is_requested_where_it_is_the_default_of_some_models(
    start: Start, monkeypatch: pytest.MonkeyPatch, of_some: bool
) -> None:
    # vLLM 0.24 has a list of them, 0.32 has none.
    name = "DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES"
    monkeypatch.delattr(vllm_defaults, name, raising=False)
    if of_some:
        monkeypatch.setattr(vllm_defaults, name, frozenset(), raising=False)
    start(on_cpu=True)
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ
    start()
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == ("1" if of_some else None)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    start()
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_vllm_does_not_change_the_trainers_determinism(start: Start) -> None:
    bmm = torch.bmm
    torch.use_deterministic_algorithms(True)
    _, passed = start()
    assert not passed["deterministic"]
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.bmm is bmm


@pytest.mark.parametrize(("measured", "expected"), [(10**9, (7 + 1) * 3000), (5000, 5000)])
def test_the_cache_is_no_larger_than_a_batch(
    monkeypatch: pytest.MonkeyPatch, measured: int, expected: int
) -> None:
    monkeypatch.setattr(gpu_worker.Worker, "determine_available_memory", lambda self: measured)
    worker = Worker.__new__(Worker)
    worker.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=7))
    layers = {str(i): SimpleNamespace(max_memory_usage_bytes=lambda config: 1000) for i in range(3)}
    worker.model_runner = SimpleNamespace(get_kv_cache_spec=lambda: layers)
    assert worker.determine_available_memory() == expected


def test_cache_memory_of_a_sequence_follows_vllms_cache_kinds() -> None:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=100),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
    )
    assert spec.max_memory_usage_bytes(config) == 7 * 16 * (2 * 2 * 64 * 2)


def test_worker_extension_has_no_method_of_vllms_worker() -> None:
    # vLLM refuses an extension that has a name of its worker.
    own = {name for name in dir(WorkerExtension) if not name.startswith("__")}
    assert not own & set(dir(Worker))


def test_batch_invariant_products_have_no_backward_pass_where_they_replace_linear() -> None:
    """Show why `deterministic: true` is refused before Hopper.

    The test registers on a CPU what vLLM registers there.
    """
    script = """
import torch
library = torch.library.Library("aten", "IMPL")
library.impl("aten::linear", lambda x, w, b=None: torch.mm(x, w.t()), "CPU")
x = torch.ones(2, 2, requires_grad=True)
try:
    torch.nn.functional.linear(x, torch.ones(2, 2)).sum().backward()
except NotImplementedError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "aten::linear_backward" in done.stdout


def test_an_engine_in_a_separate_process_is_prepared_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    def build(recipe: Recipe, model: object, options: EngineOptions) -> object:
        order.append("build")
        return SimpleNamespace(shares_weights=False)

    monkeypatch.setattr(parallel, "prepare_process", lambda recipe: order.append("prepare"))
    monkeypatch.setattr(remote, "build_engine", build)
    remote.EngineServer().start(quickstart(), EngineOptions("model", torch.float32, (1,)))
    assert order == ["prepare", "build"]
