"""Damage a run's files and resume.

Damaged files are found, named and kept. The run continues from intact files, or is refused without
changes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.records.files import damage, verify_folder
from harness.records.run_dir import RunDir
from tests.faults.cases import CORRUPTIONS, NAMED, OTHER_OUTCOMES, REFUSALS, REFUSED, Corruption
from tests.faults.compare import differences, digests, lost_steps, rows
from tests.faults.conftest import Record, Runs, UndisturbedRun
from tests.faults.hooks import Fault


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _garble(path: Path) -> None:
    """Corrupt the third line of a log, or a manifest's status."""
    content = path.read_bytes()
    old, new = {
        ".jsonl": (b'{"step": 2', b'{"st#p: 2'),
        ".json": (b'  "status": "RUNNING"', b'  "status": "RUNNONG"'),
    }[path.suffix]
    assert content.count(b"\n" + old) == 1
    path.write_bytes(content.replace(b"\n" + old, b"\n" + new))


def _renumber(path: Path) -> None:
    *lines, last = path.read_text().splitlines(keepends=True)
    row = json.loads(last)
    path.write_text("".join(lines) + json.dumps({**row, "reward": row["reward"] + 0.25}) + "\n")


def _unfinish(path: Path) -> None:
    """Leave half a checkpoint under its temporary name, like a kill during its write."""
    temporary = path.with_name(f".{path.name}.ab12cd34")
    temporary.mkdir()
    path.rename(temporary / "new")
    (temporary / "new" / "COMPLETE").unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "halve": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "flip": _flip,
    "remove": _remove,
    "garble": _garble,
    "renumber": _renumber,
    "unfinished": _unfinish,
}


@pytest.fixture(scope="module")
def stopped(runs: Runs) -> RunDir:
    """Return a run killed in its fifth step, with checkpoints of its third and fourth."""
    outcome = runs.start("stopped", fault=Fault("call", "rltrain.step:sample_rollouts", 5))
    assert outcome.killed, outcome.output
    run = runs.get("stopped")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_000003", "step_000004"]
    return run


@pytest.fixture
def copy(stopped: RunDir, tmp_path: Path) -> RunDir:
    """Return a copy of the stopped run, to be damaged."""
    shutil.copytree(stopped.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def _damage(run: RunDir, file: str, how: str) -> None:
    files = list(run.path.glob(file))
    assert files
    for path in files:
        DAMAGE[how](path)


QUICK = (
    "weights: one bit flipped",
    "optimizer: one bit flipped",
    "COMPLETE missing",
    "every checkpoint damaged",
    "metrics.jsonl: last line cut",
    "adapter/best: one bit flipped",
)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in QUICK else pytest.mark.slow)
        for case in CORRUPTIONS
    ],
)
def test_damage_is_named_and_the_last_intact_state_is_used(
    case: Corruption, copy: RunDir, runs: Runs, undisturbed: UndisturbedRun, record: Record
) -> None:
    _damage(copy, case.file, case.how)
    before = digests(copy.path)
    outcome = runs.resume(copy)
    assert outcome.status == 0, outcome.output
    assert case.message in outcome.output
    assert "Traceback" not in outcome.output
    assert differences(undisturbed.run, copy) == []
    assert f"step {case.from_step + 1}/6" in outcome.output
    assert (f"step {case.from_step}/6" in outcome.output) == (case.from_step == 0)
    kept = {path.name for path in copy.aside.iterdir()} if copy.aside.exists() else set()
    assert kept == set(case.aside)
    # The best adapter first, then newer checkpoints before older ones, then the log.
    order = ["best", "step_000004", "step_000003", "metrics.jsonl"]
    moved = [entry["as"] for entry in copy.read_manifest().get("set_aside", [])]
    assert moved == sorted(case.aside, key=order.index)
    for path in copy.aside.rglob("*"):
        original = _original_path(path.relative_to(copy.aside))
        assert before[original] == (path.read_bytes() if path.is_file() else None)
    record(case.name, case.happened, lost_steps(undisturbed.run, copy))


def _original_path(kept: Path) -> str:
    """Return the original path of a file or folder in set_aside/."""
    folders = {"best": "adapter", "step_000003": "checkpoints", "step_000004": "checkpoints"}
    return str(Path(folders.get(kept.parts[0], "")) / kept)


@pytest.mark.parametrize(
    ("name", "file", "how", "message"), REFUSALS, ids=[name for name, *_ in REFUSALS]
)
def test_ambiguous_damage_is_refused(
    name: str, file: str, how: str, message: str, copy: RunDir, runs: Runs, record: Record
) -> None:
    _damage(copy, file, how)
    before = digests(copy.path)
    outcome = runs.resume(copy)
    assert outcome.status == 2, outcome.output
    assert message in outcome.output
    assert str(copy.path / file) in outcome.output
    assert "Traceback" not in outcome.output
    assert digests(copy.path) == before
    record(name, REFUSED, 0)


def test_a_final_adapter_damaged_before_the_runs_end_is_written_again(
    runs: Runs, undisturbed: UndisturbedRun, tmp_path: Path, record: Record
) -> None:
    """Kill a run after its last checkpoint, before COMPLETE.

    The adapter can be written again from the checkpoint.
    """
    name = "adapter/final damaged after the last checkpoint"
    assert runs.start("ending", fault=Fault("call", "rltrain.trainer:Trainer._finish")).killed
    run = runs.get("ending")
    _damage(run, "adapter/final/adapter_model.safetensors", "flip")
    with pytest.raises(UserError, match="adapter_model.safetensors is damaged"):
        verify_folder(run.adapter / "final")
    damaged = digests(run.adapter / "final")
    outcome = runs.resume(run)
    assert outcome.status == 0, outcome.output
    assert "adapter/final is set aside" in outcome.output
    assert differences(undisturbed.run, run) == []
    assert digests(run.aside / "final") == damaged
    record(name, OTHER_OUTCOMES[name], lost_steps(undisturbed.run, run))


@pytest.mark.parametrize("own", [True, False], ids=["the run's own", "another run's"])
def test_a_damaged_checkpoint_in_resume_mode_is_refused(
    own: bool, copy: RunDir, runs: Runs, tmp_path: Path, record: Record
) -> None:
    _damage(copy, "checkpoints/step_000003/optimizer.safetensors", "flip")
    before = digests(copy.checkpoints)
    named = f"trainer.resume_mode={copy.checkpoints}/step_000003"
    overrides = [f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"] if own else []
    outcome = runs.start("other", *overrides, named)
    assert outcome.status == 2, outcome.output
    assert f"{copy.checkpoints}/step_000003: optimizer.safetensors is damaged" in outcome.output
    assert digests(copy.checkpoints) == before
    record(NAMED, REFUSED, 0)


def test_a_run_returns_to_the_checkpoint_in_resume_mode(
    copy: RunDir, runs: Runs, undisturbed: UndisturbedRun, tmp_path: Path
) -> None:
    overrides = [f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"]
    outcome = runs.start("back", *overrides, f"trainer.resume_mode={copy.checkpoints}/step_000003")
    assert outcome.status == 0, outcome.output
    assert "checkpoints/step_000004 is set aside" in outcome.output
    assert differences(undisturbed.run, copy) == []


def test_a_run_started_from_a_checkpoint_resumes_from_its_latest(
    stopped: RunDir, runs: Runs, undisturbed: UndisturbedRun
) -> None:
    named = f"trainer.resume_mode={stopped.checkpoints}/step_000003"
    assert runs.start("heir", named, fault=Fault("call", "rltrain.step:sample_rollouts", 3)).killed
    heir = runs.get("heir")
    outcome = runs.resume(heir)
    assert outcome.status == 0, outcome.output
    assert "step 6/6" in outcome.output
    assert "step 5/6" not in outcome.output
    assert rows(heir) == rows(undisturbed.run)[4:]
    assert not heir.aside.exists()


def test_a_run_that_always_restarts_keeps_its_old_files(
    runs: Runs, undisturbed: UndisturbedRun
) -> None:
    assert runs.start(
        "anew", "trainer.resume_mode=none", fault=Fault("call", "rltrain.step:sample_rollouts", 3)
    ).killed
    run = runs.get("anew")
    outcome = runs.resume(run)
    assert outcome.status == 0, outcome.output
    assert differences(undisturbed.run, run) == []
    assert {path.name for path in run.aside.iterdir()} == {"step_000001", "step_000002"}


def test_a_checkpoint_of_another_shape_is_refused(copy: RunDir, runs: Runs, record: Record) -> None:
    before = digests(copy.path)
    outcome = runs.start(
        "larger",
        "trainer.policy.model.lora.rank=4",
        f"trainer.resume_mode={copy.checkpoints}/step_000004",
    )
    assert outcome.status == 2, outcome.output
    assert "does not fit this recipe's policy" in outcome.output
    assert digests(copy.path) == before
    record("a checkpoint of another rank", REFUSED, 0)


def test_a_read_only_directory_is_refused(
    copy: RunDir, runs: Runs, undisturbed: UndisturbedRun, record: Record
) -> None:
    before = digests(copy.path)
    if os.geteuid():
        for path in (copy.path, *copy.path.rglob("*")):
            path.chmod(0o555)
    elif not runs.warm.mount(copy.path):
        pytest.skip("root may write read-only files, and may not mount here")
    outcome = runs.resume(copy)
    assert outcome.status == 2, outcome.output
    assert f"a file cannot be written\n  got:     {copy.path}/" in outcome.output
    assert "Traceback" not in outcome.output
    assert digests(copy.path) == before
    record("read-only run directory", REFUSED, 0)


def test_a_file_that_grows_too_large_stops_the_run_and_loses_nothing(
    runs: Runs, undisturbed: UndisturbedRun, record: Record
) -> None:
    """Limit the file size so that the first checkpoint's optimizer file cannot be written."""
    name = "a file-size limit in mid-run"
    limit = (
        undisturbed.run.checkpoints / "step_000006" / "optimizer.safetensors"
    ).stat().st_size - 1
    outcome = runs.start("limited", fault=Fault("limit", size=limit))
    run = runs.get("limited")
    assert outcome.status == 2, outcome.output
    assert f"{run.checkpoints}/step_000001: File too large" in outcome.output
    assert "Traceback" not in outcome.output
    assert run.read_manifest()["reason"].startswith("OSError: [Errno 27] File too large")
    assert list(run.checkpoints.iterdir()) == []
    outcome = runs.resume(run)
    assert outcome.status == 0, outcome.output
    assert differences(undisturbed.run, run) == []
    record(name, OTHER_OUTCOMES[name], lost_steps(undisturbed.run, run))


def test_a_full_disk_stops_the_run_and_loses_nothing(
    runs: Runs, undisturbed: UndisturbedRun, tmp_path: Path, record: Record
) -> None:
    name, overrides = (
        "disk full in mid-run",
        [f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"],
    )
    one = sum(
        path.stat().st_size for path in (undisturbed.run.checkpoints / "step_000006").iterdir()
    )
    # Room for two checkpoints, the best adapter and the small files, but not for a third
    # checkpoint.
    if not runs.warm.mount(tmp_path, int(3.2 * one)):
        pytest.skip("mounting a small disk is not allowed here")
    outcome = runs.start("full", *overrides)
    assert outcome.status == 2, outcome.output
    assert "No space left on device" in outcome.output
    assert (
        f"a file cannot be written\n  got:     {tmp_path}/run/checkpoints/step_000003"
        in outcome.output
    )
    assert "Traceback" not in outcome.output
    assert _damage_of_checkpoints(runs, tmp_path, tmp_path / "first") == {
        "step_000001": None,
        "step_000002": None,
    }
    assert runs.warm.mount(tmp_path, 10 * one)
    outcome = runs.resume(RunDir(tmp_path / "run"))
    assert outcome.status == 0, outcome.output
    assert _damage_of_checkpoints(runs, tmp_path, tmp_path / "then") == {
        "step_000005": None,
        "step_000006": None,
    }
    run = RunDir(tmp_path / "then")
    assert differences(undisturbed.run, run) == []
    record(name, OTHER_OUTCOMES[name], lost_steps(undisturbed.run, run))


def _damage_of_checkpoints(runs: Runs, disk: Path, copy: Path) -> dict[str, str | None]:
    """Return the damage, if any, of each checkpoint on the small disk.

    The whole run is copied from the disk to `copy`.
    """
    shutil.copytree(runs.warm.seen(disk) / "run", copy)
    return {path.name: damage(path) for path in (copy / "checkpoints").iterdir()}
