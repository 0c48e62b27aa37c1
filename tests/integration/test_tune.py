"""Run Ray Tune under the study on made-up learning curves.

Trials end in every possible outcome, and Ray leaves nothing behind.
"""

from __future__ import annotations

import io
import re
import threading
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from rich.console import Console

from harness.core.errors import MachineError
from harness.records.run_dir import Status
from rltrain.distributed import cluster
from sweeps.execution import tune
from sweeps.study.progress import Progress
from sweeps.study.study import Study
from tests.unit.sweeps.curves import (
    DIES,
    FULL,
    HANGS,
    IS_NAN,
    RAISES,
    RANK,
    begin,
    curve_server,
    recipe_of,
)


def test_every_outcome_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rays_folder: Path
) -> None:
    for name in cluster.QUIET | cluster.LOOPBACK:
        monkeypatch.delenv(name, raising=False)
    recipe = recipe_of(
        {RANK: {"choices": [8, 1, RAISES, DIES, IS_NAN, 9, HANGS, FULL]}},
        sampler="grid",
        num_trials=8,
        max_failures=4,
        stall_seconds=2,
        max_concurrent=1,
        pruner={"name": "median", "n_startup_trials": 1},
    )
    plan, sweep_dir = begin(
        recipe, tmp_path / "a sweep's directory with a name that no socket's path could hold"
    )
    study, output = Study(sweep_dir.journal, plan), io.StringIO()
    with pytest.raises(
        MachineError, match=f"{sweep_dir.trial(7).checkpoints}: No space left on device"
    ):
        tune.run(sweep_dir, study, Progress(study, Console(file=output, width=200)), curve_server)
    assert sweep_dir.trial(7).status is Status.RUNNING
    assert study.trials()[7].state.name == "RUNNING"
    # When the disk has room, the next resume continues it.
    (sweep_dir.trials / "room").touch()
    study = Study(sweep_dir.journal, plan)
    tune.run(sweep_dir, study, Progress(study, Console(file=output, width=200)), curve_server)
    records = study.trials()
    assert records.pop().state.name == "COMPLETE"
    assert [record.state.name for record in records] == [
        "COMPLETE",
        "PRUNED",
        "FAIL",
        "FAIL",
        "FAIL",
        "COMPLETE",
        "FAIL",
    ]
    manifests = [sweep_dir.trial(number).read_manifest() for number in range(7)]
    assert [m["status"] for m in manifests] == [
        "COMPLETE",
        "PRUNED",
        "FAILED",
        "FAILED",
        "COMPLETE",
        "COMPLETE",
        "FAILED",
    ]
    assert manifests[1]["reason"] == "pruned at step 1: eval/accuracy 0.3125 by MedianPruner"
    assert manifests[2]["reason"] == "ValueError: this rank is unlucky in two lines"
    assert "process died" in manifests[3]["reason"]
    assert manifests[4]["reason"] == "eval/accuracy is nan at step 4"
    assert manifests[6]["reason"].startswith("no report for 2 s (sweep.stall_seconds): it hung")
    assert "curves.py" in sweep_dir.trial(6).log.read_text()  # where it hung
    for number, manifest in enumerate(manifests):
        assert [entry["status"] for entry in manifest["status_history"]].count("RUNNING") == 1, (
            number
        )
    # Intermediate values at every evaluation but the base's, and the pruned trial's last one as its
    # value.
    assert list(records[0].intermediate_values) == [1, 2, 3, 4]
    assert (records[1].value, records[1].intermediate_values) == (0.3125, {1: 0.3125})

    logs = [sweep_dir.trial(number).log.read_text() for number in range(6)]
    assert "unlucky\nin two lines" in logs[2]
    # A pack server trains one trial after the other, also after an exception, until it dies.
    pids = [re.findall(r"pid (\d+)", log) for log in logs]
    assert pids[0] == pids[1] == pids[2] == pids[3] != pids[4]
    assert pids[4] == pids[5]
    # Threads are those of the recipe, and the working directory has not changed.
    assert all(f"threads 1 cwd {Path.cwd()}" in log for log in logs)
    assert cluster.folders() == []


@pytest.mark.slow
def test_a_sweep_ends_at_once_when_ray_dies(tmp_path: Path, rays_folder: Path) -> None:
    plan, sweep_dir = begin(
        recipe_of({RANK: {"choices": [HANGS]}}, num_trials=1, stall_seconds=300), tmp_path / "s"
    )
    study = Study(sweep_dir.journal, plan)

    def kill() -> None:
        while "pid" not in (
            sweep_dir.trial(0).log.read_text() if sweep_dir.trial(0).log.exists() else ""
        ):
            time.sleep(0.1)
        next(one for one in psutil.Process().children() if one.name() == "gcs_server").kill()

    threading.Thread(target=kill, daemon=True).start()
    before = time.monotonic()
    with pytest.raises(MachineError, match="its process gcs_server was ended"):
        tune.run(sweep_dir, study, Progress(study, Console(file=io.StringIO())), curve_server)
    assert time.monotonic() - before < 55  # Ray itself would end this process after 60 s
    assert study.trials()[0].state.name == "RUNNING"
    assert sweep_dir.trial(0).status is Status.RUNNING
    assert cluster.folders() == []
