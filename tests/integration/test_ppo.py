"""Test that PPO with LoRA on policy and critic, sharing one base, learns on a CPU."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir

pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow
def test_ppo_learns_the_embedded_task(tmp_path: Path) -> None:
    from harness.run import main

    arguments = [
        "recipes/quickstart_ppo.yaml",
        f"trainer.ckpt_path={tmp_path}",
        "trainer.run_name=ppo",
    ]
    assert main([*arguments, "--check"]) == 0
    run_dir = RunDir(tmp_path / "ppo")
    manifest = run_dir.read_manifest()
    assert [verdict["met"] for verdict in manifest["expect"]] == [True] * 3
    result = manifest["result"]
    assert result["metrics"]["eval/accuracy"] >= result["base"]["eval/accuracy"] + 0.25
    rows = [
        row for row in MetricsFile(run_dir.metrics).rows() if "critic/explained_variance" in row
    ]
    assert len(rows) == 32
    # The values are from before the update: the critic has not been trained on the samples that it
    # explains.
    assert statistics.fmean(row["critic/explained_variance"] for row in rows[-16:]) > 0.3
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-3 for row in rows)
