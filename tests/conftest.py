"""Tiers of tests, and fixtures that all tests share.

`make test-fast` runs `tests/unit`. `make test` runs everything that is not marked `slow`, and
`make test-all` everything.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from harness.core.paths import PROJECT

TINY_MODEL = PROJECT / "rltrain" / "assets" / "tiny_gsm"
TESTS = PROJECT / "tests"
# A fast test must not load these: vLLM, Ray, the training loop, and what drives Chromium.
HEAVY_MODULES = frozenset({"vllm", "ray", "rltrain.trainer", "tests.integration.browser"})
_LOADED = pytest.StashKey[frozenset[str]]()


@pytest.fixture(scope="session")
def gsm8k_dir() -> Path:
    """Return the folder with GSM8K's `train.jsonl` and `test.jsonl`.

    It is $NOREGRET_GSM8K, else ../shared/data/gsm8k; without it the test is skipped.
    """
    configured = os.environ.get("NOREGRET_GSM8K")
    folder = Path(configured) if configured else PROJECT.parent / "shared" / "data" / "gsm8k"
    if not (folder / "test.jsonl").is_file():
        pytest.skip(
            f"GSM8K is not in {folder}: set NOREGRET_GSM8K to a folder with its "
            "train.jsonl and test.jsonl"
        )
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """Return the folder of the embedded tiny causal LM with its tokenizer; skip without."""
    if not (TINY_MODEL / "config.json").is_file():
        pytest.skip(
            "the embedded model is absent: make it with `python -m harness.prepare tiny_gsm`"
        )
    return TINY_MODEL


@pytest.fixture
def rays_folder(monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    """Return a temporary folder with a path short enough for Ray's sockets.

    No other test uses it.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch sees no CUDA device.

    `NOREGRET_GPU_TESTS=cpu` runs them on the CPU.
    """
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and "NOREGRET_GPU_TESTS" not in os.environ and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_cuda() -> bool:
    if not any(
        Path(name).exists() for name in ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia")
    ):
        return False
    import torch  # imported late, so that collecting the fast tests stays quick

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Refuse a file of the fast tier that imports a heavy module."""
    before = _heavy_modules()
    report = yield
    loaded = _heavy_modules() - before
    if loaded and isinstance(collector, pytest.Module) and _is_fast(collector.path):
        report.outcome = "failed"
        report.longrepr = _explanation(loaded)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Record which heavy modules are loaded before a test and its fixtures."""
    item.stash[_LOADED] = _heavy_modules()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail a test of the fast tier that loaded a heavy module, itself or in its fixtures."""
    yield
    before = item.stash[_LOADED]
    loaded = _heavy_modules() - before
    if loaded and _is_fast(item.path):
        pytest.fail(_explanation(loaded), pytrace=False)


def _heavy_modules() -> frozenset[str]:
    return HEAVY_MODULES.intersection(sys.modules)


def _is_fast(path: Path) -> bool:
    return path.is_relative_to(TESTS / "unit")


def _explanation(loaded: frozenset[str]) -> str:
    return (
        f"tests/unit is the fast tier, and this loaded {', '.join(sorted(loaded))}; "
        "move it to tests/integration"
    )
