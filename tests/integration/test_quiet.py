"""Test which libraries the trainer's processes do not load."""

from __future__ import annotations

import subprocess
import sys

from harness.core.paths import PROJECT

ASK = (
    "import sys; from rltrain.distributed.process import quiet_libraries; quiet_libraries(); "
    "import transformers.generation, rltrain.trainer; print('scipy' in sys.modules)"
)


def test_transformers_does_not_load_scipy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"], done.stdout
