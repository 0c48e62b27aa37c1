"""Fixture of the base model that all contract tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rltrain.distributed.process import quiet_libraries


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Qwen2."""
    quiet_libraries()
    from tests.contracts.tiny import write_base  # imports torch, only when a test needs the model

    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder
