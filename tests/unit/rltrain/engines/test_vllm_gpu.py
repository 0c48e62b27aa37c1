"""vLLM's settings on a GPU: memory, CUDA graphs, and a cache folder for each process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.core.errors import UserError
from harness.core.paths import PROJECT
from rltrain.engines import vllm_gpu
from tests.recipes import quickstart

GIB = 2**30


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100, 256, 257, 500, 512, 1000, 1024])
def test_graphs_are_captured_up_to_the_largest_batch(most: int) -> None:
    sizes = vllm_gpu.capture_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert sizes[0] == 1
    # What a batch is padded to is at most an eighth more, beyond the smallest ones.
    assert all(b - a <= max(8, a / 8) for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(
    ("asked", "free", "share"),
    [
        (0.5, 70, 0.5),  # enough is free
        (0.8, 40, 38.4 / 80),  # the trainer's model takes half of it; a fiftieth stays
        (0.8, 80, 0.8),
        (1.0, 80, 0.98),
    ],
)
def test_no_more_is_asked_for_than_is_free(asked: float, free: float, share: float) -> None:
    found = vllm_gpu.memory_share(asked, int(free * GIB), 80 * GIB, least=2 * GIB)
    assert found == pytest.approx(share)
    assert found * 80 < free


@pytest.mark.parametrize(("asked", "free"), [(0.8, 10), (0.1, 80), (0.8, 0.3)])
def test_too_little_memory_is_explained(asked: float, free: float) -> None:
    with pytest.raises(UserError) as caught:
        vllm_gpu.memory_share(asked, int(free * GIB), 80 * GIB, least=15 * GIB)
    told = str(caught.value)
    assert f"{free:.1f} of 80.0 GiB are free" in told
    assert ">= 15.0 GiB" in told
    assert "trainer.placement.colocate_all=false" in told


def test_an_engine_apart_is_refused_only_where_nothing_is_left() -> None:
    assert vllm_gpu.memory_share(0.8, GIB, 24 * GIB, least=0) > 0
    with pytest.raises(UserError):
        vllm_gpu.memory_share(0.8, GIB // 4, 24 * GIB, least=0)


def test_the_least_is_a_copy_of_the_model_and_one_sequence() -> None:
    config = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "vocab_size": 100,
    }
    layer = torch.nn.Linear(10, 10)
    model = SimpleNamespace(
        parameters=layer.parameters, config=SimpleNamespace(to_dict=lambda: config)
    )
    assert vllm_gpu.least_bytes(model, 2, 100) == 110 * 2 + 100 * (2 * 2 * 2 * 8 * 2)
    model.config = SimpleNamespace(to_dict=dict)
    assert vllm_gpu.least_bytes(model, 2, 100) == 110 * 2
    assert vllm_gpu.least_bytes(None, 2, 100) == 0


@pytest.mark.parametrize(
    ("overrides", "graphs", "scheduling"),
    [
        ([], [1, 2, 4, 6], None),
        (["generator.enforce_eager=false"], [1, 2, 4, 6], None),
        (["generator.enforce_eager=true"], None, None),
        (["deterministic=true"], [1, 2, 4, 6], False),
    ],
)
def test_settings(overrides: list[str], graphs: list[int] | None, scheduling: bool | None) -> None:
    recipe = quickstart(
        ["generator.max_num_seqs=6", "generator.gpu_memory_utilization=0.3", *overrides]
    )
    settings = vllm_gpu.gpu_settings(recipe, free=70 * GIB, total=80 * GIB, least=GIB)
    assert settings.pop("worker_cls") == "rltrain.engines.vllm_worker.Worker"
    assert settings.pop("gpu_memory_utilization") == 0.3
    assert settings.pop("compilation_config", {}).get("cudagraph_capture_sizes") == graphs
    assert settings.pop("async_scheduling", None) is scheduling
    assert not settings


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of this user's parts of vLLM's cache, in a process that has taken none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setattr(vllm_gpu, "_cache_root", None)
    yield tmp_path / "vllm" / "noregret"
    if vllm_gpu._cache_root is not None:
        vllm_gpu._cache_root.close()


HOLD = """
import os, sys
from rltrain.engines import vllm_gpu
vllm_gpu.claim_cache_root()
print(os.environ["VLLM_CACHE_ROOT"], flush=True)
sys.stdin.read()
"""


def test_each_process_has_a_cache_of_its_own_and_later_ones_take_it_again(home: Path) -> None:
    def another() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    vllm_gpu.claim_cache_root()
    assert os.environ["VLLM_CACHE_ROOT"] == str(home / "0")
    vllm_gpu.claim_cache_root()
    assert os.environ["VLLM_CACHE_ROOT"] == str(home / "0")
    # The other process inherits this one's variable, and takes it for no wish of the user's.
    first, place = another()
    assert place == str(home / "1")
    first.communicate("")
    second, place = another()
    assert place == str(home / "1")
    second.communicate("")
    assert sorted(path.name for path in home.iterdir()) == ["0", "1"]


def test_a_cache_that_the_user_set_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/somewhere/else")
    vllm_gpu.claim_cache_root()
    assert os.environ["VLLM_CACHE_ROOT"] == "/somewhere/else"
    assert not home.exists()


def test_where_no_cache_can_be_made_vllm_keeps_its_own(home: Path) -> None:
    home.parent.write_text("a file in the place of the folder")
    vllm_gpu.claim_cache_root()
    assert "VLLM_CACHE_ROOT" not in os.environ
