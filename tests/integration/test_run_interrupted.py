"""Stop `python -m harness.run` by a signal and resume it from the command line."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from harness.core.paths import PROJECT
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from tests.integration.conftest import restore_interrupts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status"),
    [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["INT", "KILL"],
)
def test_a_stopped_run_resumes_by_its_directory(
    small_data: list[str], tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    source = Path(small_data[0].removeprefix("data.train_data=[").removesuffix("]"))
    overrides = [f"data.train_data=[{shutil.copy(source, tmp_path)}]", *small_data[1:]]
    start = [
        sys.executable,
        "-m",
        "harness.run",
        "recipes/quickstart.yaml",
        *overrides,
        "trainer.max_steps=30",
        f"trainer.ckpt_path={tmp_path}",
        "trainer.run_name=run",
    ]
    process = subprocess.Popen(
        start,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts,
    )
    assert process.stdout is not None
    assert any(line.startswith("step  5/30") for line in process.stdout)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    run = RunDir(tmp_path / "run")
    assert run.read_manifest()["status"] == "RUNNING"
    resume = f"python -m harness.run --resume {run.path}"
    assert (resume in errors) == (sent is signal.SIGINT)
    data = tmp_path / "train.parquet"
    pd.read_parquet(data).iloc[::-1].to_parquet(data)
    again = [sys.executable, *resume.split()[1:]]
    refused = subprocess.run(again, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert f"data {data}" in refused.stderr
    again.append("--changed-inputs")
    done = subprocess.run(again, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"note: continuing with changed inputs: data {data}" in done.stdout
    assert run.read_manifest()["inputs"] == [1, 2]
    assert run.read_manifest()["status"] == "COMPLETE"
    assert [row["step"] for row in MetricsFile(run.metrics).rows()] == list(range(31))
