"""Run whole sweeps on the embedded model.

They include every outcome, a kill, a Ctrl-C, and confirmation of the best trial.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from harness.config import metrics
from harness.core.paths import PROJECT
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from tests.integration.conftest import restore_interrupts

pytestmark = pytest.mark.timeout(600)

RANK, LR = "trainer.policy.model.lora.rank", "trainer.policy.optimizer_config.lr"
TARGETS = "trainer.target_modules"
# Removes the recipe's axes.
NOTHING = [
    f"sweep.space.{key}=null" for key in (RANK, "trainer.policy.model.lora.alpha", LR, TARGETS)
]
NOTHING += ["sweep.first_trials=[]", "sweep.pruner=null"]
MARK = "NOREGRET_TEST_MARK"


class Sweeps:
    """Starts sweep commands whose descendants all carry a mark, to find leftover processes."""

    def __init__(self, root: Path, overrides: list[str]) -> None:
        self.root = root
        self.overrides = [
            *overrides,
            f"trainer.ckpt_path={root}",
            "sweep.max_concurrent=1",
            "sweep.seeds=[0]",
        ]
        self.mark = uuid.uuid4().hex

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a sweep command."""
        return subprocess.Popen(
            [sys.executable, "-m", "harness.sweep", *arguments],
            cwd=PROJECT,
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=restore_interrupts,
        )

    def new(self, name: str, *overrides: str) -> subprocess.Popen[str]:
        """Start a new, small sweep of the quickstart recipe."""
        return self.start("quickstart", *self.overrides, f"trainer.run_name={name}", *overrides)

    def training_files(self) -> tuple[str, str]:
        """Return the training file, and a copy whose rows name a reward that raises."""
        file = self.overrides[0].rstrip("]").partition("=[")[2]
        self.root.mkdir(exist_ok=True)
        failing = self.root / "raises.parquet"
        pd.read_parquet(file).assign(env_class="tests.faults.environments.raises").to_parquet(
            failing
        )
        return file, str(failing)

    def left_over(self) -> list[int]:
        """Return processes that still carry the mark."""
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    pids.append(int(folder.name))
        return pids


@pytest.fixture
def sweeps(tmp_path: Path, small_data: list[str]) -> Iterator[Sweeps]:
    sweeps = Sweeps(tmp_path / "runs", small_data)
    yield sweeps
    for pid in sweeps.left_over():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def finished(process: subprocess.Popen[str], status: int = 0) -> str:
    out, err = process.communicate(timeout=280)
    assert process.returncode == status, out + err
    return out + err


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def manifests(sweep: RunDir) -> list[dict[str, Any]]:
    return [RunDir(folder).read_manifest() for folder in sorted(sweep.trials.iterdir())]


def studied(sweep: RunDir) -> list[optuna.trial.FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(sweep.journal)))
    return optuna.load_study(study_name=None, storage=storage).trials


def steps_of(run: RunDir) -> list[int]:
    return [int(row["step"]) for row in MetricsFile(run.metrics).rows()]


def rows_of(run: RunDir) -> list[dict[str, float]]:
    return [metrics.without_timings(row) for row in MetricsFile(run.metrics).rows()]


@pytest.mark.slow
def test_complete_pruned_and_failed_trials(sweeps: Sweeps) -> None:
    # A grid of 2 x 2: a run of 4 steps is pruned at step 2, the last step of a run of 2. A reward
    # with a bug fails.
    good, failing = sweeps.training_files()
    space = f"sweep.space={{data.train_data:{{choices:[[{good}],[{failing}]]}},trainer.max_steps:{{choices:[2,4]}}}}"  # noqa: E501
    process = sweeps.new(
        "all",
        *NOTHING,
        space,
        "sweep.sampler=grid",
        "sweep.num_trials=4",
        "sweep.pruner={name:threshold,lower:2.0}",
    )
    output = finished(process)
    sweep = RunDir(sweeps.root / "all")
    assert [m["status"] for m in manifests(sweep)] == ["COMPLETE", "PRUNED", "FAILED", "FAILED"]
    assert [trial.state.name for trial in studied(sweep)] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    _, pruned, failed, _ = manifests(sweep)
    raised = "the reward of tests.faults.environments.raises raised LookupError: no score for"
    assert failed["reason"].startswith(raised)
    assert "Traceback" in sweep.trial(2).log.read_text()
    assert pruned["reason"].startswith("pruned at step 2: eval/accuracy")
    assert steps_of(sweep.trial(1)) == [0, 1, 2]
    assert steps_of(sweep.trial(0)) == [0, 1, 2]

    record = sweep.read_manifest()
    assert record["status"] == "COMPLETE"
    assert record["result"]["counts"] == {"COMPLETE": 1, "PRUNED": 1, "FAIL": 2}
    assert record["result"]["best"]["trial"] == 0
    table = pd.read_csv(sweep.path / "results.csv")
    assert table["status"].tolist() == ["COMPLETE", "PRUNED", "FAILED", "FAILED"]
    assert (sweep.report / "index.html").is_file()
    assert "1 complete, 1 pruned, 2 failed" in output
    assert "python -m harness.run quickstart" in output
    assert sweeps.left_over() == []


@pytest.mark.slow
def test_a_sweep_of_failures_exits_1(sweeps: Sweeps) -> None:
    only = f"sweep.space={{data.train_data:{{choices:[[{sweeps.training_files()[1]}]]}}}}"
    output = finished(sweeps.new("none", *NOTHING, only, "sweep.num_trials=1"), status=1)
    assert "1 failed" in output
    assert RunDir(sweeps.root / "none").status.value == "FAILED"


@pytest.mark.parametrize("interrupted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kill_and_interrupt_and_resume(sweeps: Sweeps, interrupted: bool) -> None:
    trials = 3 if interrupted else 2
    sweep = RunDir(sweeps.root / "stopped")
    # Long enough that a signal sent at step 2 comes before the end, even on a fast machine.
    first = sweeps.new(
        "stopped",
        f"sweep.num_trials={trials}",
        "sweep.first_trials=[]",
        "sweep.pack_size=1",
        "trainer.max_steps=12",
        "trainer.eval_interval=12",
    )
    wait_until(lambda: steps_of(sweep.trial(1))[-1:] >= [2], first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = [sweep.trial(0).manifest.read_bytes(), sweep.trial(0).metrics.read_bytes()]
    assert [m["status"] for m in manifests(sweep)] == ["COMPLETE", "RUNNING"]

    if interrupted:
        second = sweeps.start("--resume", str(sweep.path))
        wait_until(lambda: steps_of(sweep.trial(2))[-1:] >= [2], second)
        os.killpg(second.pid, signal.SIGINT)
        assert f"--resume {sweep.path}" in finished(second, status=130)
        assert manifests(sweep)[2]["status"] == "RUNNING"

    output = finished(sweeps.start("--resume", str(sweep.path)))
    assert f"{trials} complete, 0 pruned, 0 failed" in output
    assert "has not ended" not in (sweep.report / "report.md").read_text()
    assert [sweep.trial(0).manifest.read_bytes(), sweep.trial(0).metrics.read_bytes()] == before
    assert [trial.state.name for trial in studied(sweep)] == ["COMPLETE"] * trials
    assert len({json.dumps(trial.params, sort_keys=True) for trial in studied(sweep)}) == trials
    histories = [[entry["status"] for entry in m["status_history"]] for m in manifests(sweep)]
    resumed = ["CREATED", "RUNNING", "RUNNING", "COMPLETE"]
    assert histories == [["CREATED", "RUNNING", "COMPLETE"], *[resumed] * (trials - 1)]
    for number in range(trials):
        assert steps_of(sweep.trial(number)) == list(range(13))
    assert sweeps.left_over() == []

    # A trial that was killed and resumed equals, to the bit, the run of its command.
    again = next(line for line in output.splitlines() if line.startswith("again: ")).removeprefix(
        "again: python"
    )
    best = sweep.read_manifest()["result"]["best"]["trial"]
    location = [f"trainer.ckpt_path={sweeps.root}", "trainer.run_name=again"]
    run = subprocess.run(
        [sys.executable, *shlex.split(again), *location],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    alone = RunDir(sweeps.root / "again")
    assert (
        alone.read_manifest()["recipe"]["digest"]
        == sweep.trial(best).read_manifest()["recipe"]["digest"]
    )
    assert rows_of(alone) == rows_of(sweep.trial(best))


@pytest.mark.slow
def test_the_best_is_confirmed_on_new_seeds_across_a_kill(sweeps: Sweeps) -> None:
    sweep = RunDir(sweeps.root / "confirmed")
    rates = f"sweep.space.{LR}={{choices:[1e-5,1e-3],low:null,high:null,log:null}}"
    source = Path(sweeps.overrides[0].removeprefix("data.train_data=[").removesuffix("]"))
    sweeps.overrides[0] = f"data.train_data=[{shutil.copy(source, sweeps.root.parent)}]"
    first = sweeps.new(
        "confirmed",
        *NOTHING,
        rates,
        "sweep.sampler=grid",
        "sweep.num_trials=2",
        "trainer.max_steps=16",
        "trainer.eval_interval=16",
        "--confirm",
        "1",
    )
    wait_until(lambda: steps_of(sweep.trial(3))[-1:] >= [3], first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    output = finished(sweeps.start("--resume", str(sweep.path)))
    assert "4 complete, 0 pruned, 0 failed" in output
    best = sweep.read_manifest()["result"]["best"]
    trials = [m["trial"] for m in manifests(sweep)]
    assert [(t["seed"], t["confirm"]) for t in trials] == [
        (0, False),
        (0, False),
        (1, True),
        (2, True),
    ]
    assert {t["configuration"] for t in trials[2:]} == {best["configuration"]}
    assert trials[2]["params"] == trials[3]["params"] == best["params"]
    assert [steps_of(sweep.trial(number)) for number in (2, 3)] == [list(range(17))] * 2
    assert best["seeds"] == 2  # its score is the mean on the fresh seeds
    assert len(studied(sweep)) == 4

    # A configuration chosen on other data is not confirmed.
    data = sweeps.root.parent / "train.parquet"
    whole = data.read_bytes()
    pd.read_parquet(data).iloc[::-1].to_parquet(data)
    confirm = ["--resume", str(sweep.path), "--confirm", "2"]
    assert f"data {data}: sha256:" in finished(sweeps.start(*confirm), status=2)
    assert len(studied(sweep)) == 4
    data.write_bytes(whole)

    # A complete sweep gets more trials.
    output = finished(sweeps.start("--resume", str(sweep.path), "--confirm", "2"))
    assert "6 complete, 0 pruned, 0 failed" in output
    assert [m["trial"]["configuration"] for m in manifests(sweep)[4:]] == [
        1 - best["configuration"]
    ] * 2
    assert [entry["status"] for entry in sweep.read_manifest()["status_history"]][-3:] == [
        "COMPLETE",
        "RUNNING",
        "COMPLETE",
    ]
    assert sweeps.left_over() == []


@pytest.mark.slow
def test_trials_share_a_vllm_engine(sweeps: Sweeps) -> None:
    finished(
        sweeps.new(
            "vllm",
            "generator.backend=vllm",
            "trainer.max_steps=1",
            "sweep.num_trials=2",
            f"sweep.first_trials=[{{{RANK}:1}},{{{RANK}:8}}]",
        )
    )
    sweep = RunDir(sweeps.root / "vllm")
    assert [m["trial"]["params"][RANK] for m in manifests(sweep)] == [1, 8]
    assert [m["status"] for m in manifests(sweep)] == ["COMPLETE"] * 2
    gaps = [
        row["sampling/sampling_logp_difference/mean"]
        for n in range(2)
        for row in rows_of(sweep.trial(n))[1:]
    ]
    assert len(gaps) == 2
    assert max(gaps) < 1e-3
