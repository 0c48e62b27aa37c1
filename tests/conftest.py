"""Fixtures shared by all tests: where the optional data is, and what to skip where something is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.paths import PROJECT

TINY_MODEL = PROJECT / "rltrain" / "assets" / "tiny_gsm"


@pytest.fixture(scope="session")
def gsm8k_dir() -> Path:
    """Folder with GSM8K's `train.jsonl` and `test.jsonl`: $NOREGRET_GSM8K, else ../shared/data/gsm8k; skips without."""
    configured = os.environ.get("NOREGRET_GSM8K")
    folder = Path(configured) if configured else PROJECT.parent / "shared" / "data" / "gsm8k"
    if not (folder / "test.jsonl").is_file():
        pytest.skip(f"GSM8K is not in {folder}: set NOREGRET_GSM8K to a folder with its train.jsonl and test.jsonl")
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """Folder of the embedded tiny causal LM with its tokenizer; skips without."""
    if not (TINY_MODEL / "config.json").is_file():
        pytest.skip("the embedded model is absent: make it with `python -m harness.prepare tiny_gsm`")
    return TINY_MODEL


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only now: collecting the light tests must stay quick

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
