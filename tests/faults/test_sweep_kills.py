"""Kill a sweep by SIGKILL several times; it then equals an undisturbed sweep.

A damaged journal is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.records.run_dir import RunDir
from tests.faults.cases import REFUSED, SAME, SWEEP_KILLS
from tests.faults.compare import digests, lost_steps, sweep_differences
from tests.faults.conftest import Record
from tests.faults.forks import Outcome, WarmProcess
from tests.faults.hooks import Fault


@dataclass(frozen=True, slots=True)
class Sweeps:
    """Starts and resumes sweeps of one small recipe in the warm process."""

    warm: WarmProcess
    root: Path
    overrides: list[str]

    def run(self, name: str, fault: Fault | None = None) -> Outcome:
        """Start a sweep of this name, or resume it."""
        directory = self.root / name
        location = [f"trainer.ckpt_path={self.root}", f"trainer.run_name={name}"]
        new = ["recipes/quickstart.yaml", *self.overrides, *location]
        started = (directory / "manifest.json").exists()
        return self.warm.run(
            "harness.sweep",
            *(["--resume", str(directory)] if started else new),
            directory=directory,
            fault=fault,
        )

    def get(self, name: str) -> RunDir:
        """Return the directory of a sweep."""
        return RunDir(self.root / name)


@pytest.fixture(scope="module")
def sweeps(warm: WarmProcess, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Sweeps:
    """Return the object that starts and resumes sweeps of two trials, one after the other."""
    short = [
        "trainer.max_steps=4",
        "sweep.num_trials=2",
        "sweep.seeds=[0]",
        "sweep.max_concurrent=1",
        "sweep.first_trials=[]",
        "sweep.pruner=null",
    ]
    return Sweeps(warm, tmp_path_factory.mktemp("sweeps"), [*small, *short])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_sweep_equals_undisturbed_sweep(sweeps: Sweeps, record: Record) -> None:
    for kill in SWEEP_KILLS:
        outcome = sweeps.run("killed", kill.fault)
        assert outcome.killed, f"{kill} did not strike: {outcome.output}"
        assert "Traceback" not in outcome.output
    for name in ("killed", "undisturbed"):
        outcome = sweeps.run(name)
        assert outcome.status == 0, outcome.output
    killed, undisturbed = sweeps.get("killed"), sweeps.get("undisturbed")
    assert sweep_differences(undisturbed, killed) == []
    assert sweeps.warm.left_over() == []
    lost = sum(lost_steps(undisturbed.trial(number), killed.trial(number)) for number in range(2))
    for kill in SWEEP_KILLS:
        record(f"SIGKILL: {kill.phase}", SAME, lost)


@pytest.fixture(scope="module")
def started(sweeps: Sweeps) -> RunDir:
    """Return a sweep killed before its first trial, with a journal of its plan."""
    assert sweeps.run("begun", Fault("file", r"rename recipe\.yaml", 2)).killed
    return sweeps.get("begun")


def _flip(content: bytes) -> bytes:
    """Flip one bit of a name, so that the line stays valid JSON."""
    return content.replace(b"eval/accuracy", b"eval/accuracx")


def _lose(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(lines[:2] + lines[3:])


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("study.journal: one bit flipped in the middle", _flip, 4),
        ("study.journal: a line missing", _lose, 3),
    ],
)
def test_a_damaged_journal_is_refused(
    name: str,
    change: Callable[[bytes], bytes],
    line: int,
    started: RunDir,
    sweeps: Sweeps,
    tmp_path: Path,
    record: Record,
) -> None:
    copy = RunDir(tmp_path / "sweep")
    shutil.copytree(started.path, copy.path)
    copy.journal.write_bytes(change(started.journal.read_bytes()))
    before = digests(copy.path)
    outcome = sweeps.warm.run("harness.sweep", "--resume", str(copy.path), directory=copy.path)
    assert outcome.status == 2, outcome.output
    assert f"line {line} of study.journal is damaged" in outcome.output
    assert "Traceback" not in outcome.output
    assert digests(copy.path) == before
    record(name, REFUSED, 0)
