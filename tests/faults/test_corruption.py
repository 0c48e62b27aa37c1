"""Damaged files are found, named and kept; the run goes on from what is whole, or is refused with
nothing changed.
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
from tests.faults.cases import CORRUPTIONS, NAMED, OTHERS, REFUSALS, REFUSED, Corruption
from tests.faults.compare import differences, digests, lost_steps, rows
from tests.faults.conftest import Record, Runs, Whole
from tests.faults.hooks import Fault


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _garble(path: Path) -> None:
    """Spoil the third line of a log, or a manifest's status."""
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
    """What a kill amid a checkpoint's write leaves: half of it, under a temporary name."""
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
    """A run killed in its fifth step, with checkpoints of its third and fourth."""
    outcome = runs.start("stopped", fault=Fault("call", "rltrain.step:sample_rollouts", 5))
    assert outcome.killed, outcome.said
    run = runs.get("stopped")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_000003", "step_000004"]
    return run


@pytest.fixture
def copy(stopped: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the stopped run, to be damaged."""
    shutil.copytree(stopped.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def _spoil(run: RunDir, file: str, how: str) -> None:
    found = list(run.path.glob(file))
    assert found
    for path in found:
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
def test_damage_is_named_and_the_last_good_state_used(
    case: Corruption, copy: RunDir, runs: Runs, whole: Whole, record: Record
) -> None:
    _spoil(copy, case.file, case.how)
    before = digests(copy.path)
    outcome = runs.resume(copy)
    assert outcome.status == 0, outcome.said
    assert case.said in outcome.said
    assert "Traceback" not in outcome.said
    assert differences(whole.run, copy) == []
    assert f"step {case.from_step + 1}/6" in outcome.said
    assert (f"step {case.from_step}/6" in outcome.said) == (case.from_step == 0)
    kept = {path.name for path in copy.aside.iterdir()} if copy.aside.exists() else set()
    assert kept == set(case.aside)
    assert [entry["as"] for entry in copy.read_manifest().get("set_aside", [])] == _order(
        case.aside
    )
    for path in copy.aside.rglob("*"):
        was = _was(path.relative_to(copy.aside))
        assert before[was] == (path.read_bytes() if path.is_file() else None)
    record(case.name, case.happened, lost_steps(whole.run, copy))


def _order(aside: tuple[str, ...]) -> list[str]:
    """The best adapter first, the log last, the newest checkpoint before the one before it."""
    place = {"best": 0, "step_000004": 1, "step_000003": 2, "metrics.jsonl": 3}
    return sorted(aside, key=place.__getitem__)


def _was(kept: Path) -> str:
    """Where a thing that was set aside came from."""
    folders = {"best": "adapter", "step_000003": "checkpoints", "step_000004": "checkpoints"}
    return str(Path(folders.get(kept.parts[0], "")) / kept)


@pytest.mark.parametrize(
    ("name", "file", "how", "said"), REFUSALS, ids=[name for name, *_ in REFUSALS]
)
def test_damage_that_leaves_only_guesses_is_refused(
    name: str, file: str, how: str, said: str, copy: RunDir, runs: Runs, record: Record
) -> None:
    _spoil(copy, file, how)
    before = digests(copy.path)
    outcome = runs.resume(copy)
    assert outcome.status == 2, outcome.said
    assert said in outcome.said
    assert str(copy.path / file) in outcome.said
    assert "Traceback" not in outcome.said
    assert digests(copy.path) == before
    record(name, REFUSED, 0)


def test_a_final_adapter_damaged_before_the_runs_end_is_written_again(
    runs: Runs, whole: Whole, tmp_path: Path, record: Record
) -> None:
    """Killed after its last checkpoint, before COMPLETE: the checkpoint has what the adapter is
    made of.
    """
    name = "adapter/final damaged after the last checkpoint"
    assert runs.start("ending", fault=Fault("call", "rltrain.trainer:Trainer._finish")).killed
    run = runs.get("ending")
    _spoil(run, "adapter/final/adapter_model.safetensors", "flip")
    with pytest.raises(UserError, match="adapter_model.safetensors is damaged"):
        verify_folder(run.adapter / "final")
    damaged = digests(run.adapter / "final")
    outcome = runs.resume(run)
    assert outcome.status == 0, outcome.said
    assert "adapter/final is set aside" in outcome.said
    assert differences(whole.run, run) == []
    assert digests(run.aside / "final") == damaged
    record(name, OTHERS[name], lost_steps(whole.run, run))


@pytest.mark.parametrize("own", [True, False], ids=["the run's own", "another run's"])
def test_a_damaged_checkpoint_that_is_named_is_refused(
    own: bool, copy: RunDir, runs: Runs, tmp_path: Path, record: Record
) -> None:
    _spoil(copy, "checkpoints/step_000003/optimizer.safetensors", "flip")
    before = digests(copy.checkpoints)
    named = f"trainer.resume_mode={copy.checkpoints}/step_000003"
    place = [f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"] if own else []
    outcome = runs.start("other", *place, named)
    assert outcome.status == 2, outcome.said
    assert f"{copy.checkpoints}/step_000003: optimizer.safetensors is damaged" in outcome.said
    assert digests(copy.checkpoints) == before
    record(NAMED, REFUSED, 0)


def test_a_named_checkpoint_is_gone_back_to(
    copy: RunDir, runs: Runs, whole: Whole, tmp_path: Path
) -> None:
    place = [f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"]
    outcome = runs.start("back", *place, f"trainer.resume_mode={copy.checkpoints}/step_000003")
    assert outcome.status == 0, outcome.said
    assert "checkpoints/step_000004 is set aside" in outcome.said
    assert differences(whole.run, copy) == []


def test_a_run_from_anothers_checkpoint_goes_on_from_its_own(
    stopped: RunDir, runs: Runs, whole: Whole
) -> None:
    named = f"trainer.resume_mode={stopped.checkpoints}/step_000003"
    assert runs.start("heir", named, fault=Fault("call", "rltrain.step:sample_rollouts", 3)).killed
    heir = runs.get("heir")
    outcome = runs.resume(heir)
    assert outcome.status == 0, outcome.said
    assert "step 6/6" in outcome.said
    assert "step 5/6" not in outcome.said
    assert rows(heir) == rows(whole.run)[4:]
    assert not heir.aside.exists()


def test_a_run_that_always_starts_anew_keeps_what_it_had(runs: Runs, whole: Whole) -> None:
    assert runs.start(
        "anew", "trainer.resume_mode=none", fault=Fault("call", "rltrain.step:sample_rollouts", 3)
    ).killed
    run = runs.get("anew")
    outcome = runs.resume(run)
    assert outcome.status == 0, outcome.said
    assert differences(whole.run, run) == []
    assert {path.name for path in run.aside.iterdir()} == {"step_000001", "step_000002"}


def test_a_checkpoint_of_another_shape_is_refused(copy: RunDir, runs: Runs, record: Record) -> None:
    before = digests(copy.path)
    outcome = runs.start(
        "larger",
        "trainer.policy.model.lora.rank=4",
        f"trainer.resume_mode={copy.checkpoints}/step_000004",
    )
    assert outcome.status == 2, outcome.said
    assert "does not fit this recipe's policy" in outcome.said
    assert digests(copy.path) == before
    record("a checkpoint of another rank", REFUSED, 0)


def test_a_read_only_directory_is_refused(
    copy: RunDir, runs: Runs, whole: Whole, record: Record
) -> None:
    before = digests(copy.path)
    if os.geteuid():
        for path in (copy.path, *copy.path.rglob("*")):
            path.chmod(0o555)
    elif not runs.warm.mount(copy.path):
        pytest.skip("root may write read-only files, and may not mount here")
    outcome = runs.resume(copy)
    assert outcome.status == 2, outcome.said
    assert f"a file cannot be written\n  got:     {copy.path}/" in outcome.said
    assert "Traceback" not in outcome.said
    assert digests(copy.path) == before
    record("read-only run directory", REFUSED, 0)


def test_a_file_that_grows_too_large_stops_the_run_and_loses_nothing(
    runs: Runs, whole: Whole, record: Record
) -> None:
    """An optimizer's file is larger than any before it: the first checkpoint cannot be written."""
    name = "a file-size limit in mid-run"
    limit = (whole.run.checkpoints / "step_000006" / "optimizer.safetensors").stat().st_size - 1
    outcome = runs.start("limited", fault=Fault("limit", size=limit))
    run = runs.get("limited")
    assert outcome.status == 2, outcome.said
    assert f"{run.checkpoints}/step_000001: File too large" in outcome.said
    assert "Traceback" not in outcome.said
    assert run.read_manifest()["reason"].startswith("OSError: [Errno 27] File too large")
    assert list(run.checkpoints.iterdir()) == []
    outcome = runs.resume(run)
    assert outcome.status == 0, outcome.said
    assert differences(whole.run, run) == []
    record(name, OTHERS[name], lost_steps(whole.run, run))


def test_a_full_disk_stops_the_run_and_loses_nothing(
    runs: Runs, whole: Whole, tmp_path: Path, record: Record
) -> None:
    name, place = "disk full in mid-run", [f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"]
    one = sum(path.stat().st_size for path in (whole.run.checkpoints / "step_000006").iterdir())
    # Room for two checkpoints, the best adapter and the small files, and not for the third.
    if not runs.warm.mount(tmp_path, int(3.2 * one)):
        pytest.skip("mounting a small disk is not allowed here")
    outcome = runs.start("full", *place)
    assert outcome.status == 2, outcome.said
    assert "No space left on device" in outcome.said
    assert (
        f"a file cannot be written\n  got:     {tmp_path}/run/checkpoints/step_000003"
        in outcome.said
    )
    assert "Traceback" not in outcome.said
    assert _checkpoints_there(runs, tmp_path, tmp_path / "first") == {
        "step_000001": None,
        "step_000002": None,
    }
    assert runs.warm.mount(tmp_path, 10 * one)
    outcome = runs.resume(RunDir(tmp_path / "run"))
    assert outcome.status == 0, outcome.said
    assert _checkpoints_there(runs, tmp_path, tmp_path / "then") == {
        "step_000005": None,
        "step_000006": None,
    }
    run = RunDir(tmp_path / "then")
    assert differences(whole.run, run) == []
    record(name, OTHERS[name], lost_steps(whole.run, run))


def _checkpoints_there(runs: Runs, disk: Path, copy: Path) -> dict[str, str | None]:
    """The checkpoints on the small disk, with what is wrong with each; the whole run is copied from
    there.
    """
    shutil.copytree(runs.warm.seen(disk) / "run", copy)
    return {path.name: damage(path) for path in (copy / "checkpoints").iterdir()}
