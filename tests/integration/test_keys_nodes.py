"""Keys that need more than one machine's cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.paths import PROJECT

pytestmark = pytest.mark.timeout(280)


@pytest.mark.slow
def test_policy_num_nodes_takes_as_many_nodes_of_the_cluster_at_ray_address(tmp_path: Path) -> None:
    pytest_alone = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--timeout=240",
        f"--basetemp={tmp_path / 'own'}",
    ]
    # What other tests have set for their own Ray, and pytest-xdist for its workers, is not to be
    # this one's.
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
