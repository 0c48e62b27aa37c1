"""Test keys that need a cluster of more than one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.paths import PROJECT

pytestmark = pytest.mark.timeout(280)


@pytest.mark.slow
def test_policy_num_nodes_uses_that_many_nodes_of_the_ray_cluster(tmp_path: Path) -> None:
    pytest_alone = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--timeout=240",
        f"--basetemp={tmp_path / 'own'}",
    ]
    # Other tests' settings for Ray, and those of pytest-xdist for its workers, must not reach this
    # cluster.
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTEST_", "TUNE_"))
    }
    done = subprocess.run(
        [*pytest_alone, str(Path(__file__).with_name("two_nodes.py"))],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
