"""Resume, report and reproduce a run and a sweep that an earlier version of the code made.

Commit 43d52e0, before the trainer had one loop, wrote `tests/data/made_before`. `run` and `sweep`
were killed; `expected` has the metrics of the same without a kill. Only the finished trials'
checkpoints were left out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness import reproduce, run, sweep
from harness.config.metrics import without_timings
from harness.core import machine
from harness.core.paths import PROJECT
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status

MADE = PROJECT / "tests" / "data" / "made_before"

pytestmark = pytest.mark.timeout(600)


def copy_of(name: str, folder: Path) -> RunDir:
    return RunDir(shutil.copytree(MADE / name, folder / name))


def same_cpu(run_dir: RunDir) -> bool:
    """Return whether this CPU gives the same bits as the one that made the run."""
    made, current = run_dir.read_manifest()["hardware"], machine.hardware()
    return all(made[name] == current[name] for name in ("cpu", "simd"))


def assert_as_expected(run_dir: RunDir, name: str) -> None:
    """Compare metrics with those of an uninterrupted run; on another CPU only their names."""
    logged, expected = (
        [without_timings(row) for row in MetricsFile(file).rows()]
        for file in (run_dir.metrics, MADE / "expected" / f"{name}.jsonl")
    )
    if same_cpu(run_dir):
        assert logged == expected
    else:
        assert [(row["step"], list(row)) for row in logged] == [
            (row["step"], list(row)) for row in expected
        ]


def test_an_old_run_resumes_and_is_reproduced(tmp_path: Path) -> None:
    run_dir = copy_of("run", tmp_path)
    assert run.main(["--resume", str(run_dir.path)]) == 0
    assert run_dir.status is Status.COMPLETE
    assert_as_expected(run_dir, "run")
    assert len(run_dir.read_manifest()["resumed"]) == 1
    again = tmp_path / "again"
    status = reproduce.main([str(run_dir.path), "--output", str(again)])
    verdict = RunDir(again).read_manifest()["reproduces"]["verdict"]
    if same_cpu(run_dir):
        assert (status, verdict.split(":")[0]) == (0, "identical")
    else:
        assert status in (0, reproduce.DEPARTS)


def test_an_old_sweep_resumes_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_dir = copy_of("sweep", tmp_path)
    assert sweep.main(["--resume", str(sweep_dir.path)]) == 0
    assert "3 complete, 0 pruned, 0 failed" in capsys.readouterr().out
    result = sweep_dir.read_manifest()["result"]
    assert result["counts"] == {"COMPLETE": 3, "PRUNED": 0, "FAIL": 0}
    for number in range(3):
        assert_as_expected(sweep_dir.trial(number), f"trial{number}")
    page = (sweep_dir.report / "index.html").read_text()
    assert "3 configurations" in page
