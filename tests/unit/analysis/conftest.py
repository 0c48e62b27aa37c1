"""The example sweep, written once: reading it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.experiment import Experiment
from tests.unit.analysis.synthetic import example, write_sweep


@pytest.fixture(scope="session")
def sweep_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `synthetic.example`; tests must not change it."""
    return write_sweep(tmp_path_factory.mktemp("example"), example())


@pytest.fixture(scope="session")
def experiment(sweep_dir: Path) -> Experiment:
    """The example sweep, read."""
    return Experiment.open(sweep_dir)
