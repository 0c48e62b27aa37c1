"""What kills, a full disk and bad luck leave of files and folders: found, named, and nothing good
lost.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.records.files import (
    SUMS,
    damage,
    remove_folder,
    tidy,
    verify_folder,
    whole_folder,
    write_json,
    write_text,
)
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed folder with a file and one in a folder within it."""
    with whole_folder(tmp_path / "best") as new:
        (new / "deeper").mkdir()
        (new / "weights").write_bytes(bytes(range(256)))
        (new / "deeper" / "config").write_text("{}")
    return tmp_path / "best"


def test_a_sealed_folder_is_sound_and_sha256sum_agrees(folder: Path) -> None:
    assert damage(folder) is None
    verify_folder(folder)
    assert (
        subprocess.run(
            ["sha256sum", "--check", "--quiet", SUMS], cwd=folder, check=False
        ).returncode
        == 0
    )
    (folder / "note.txt").write_text("a file more does no harm")
    assert damage(folder) is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("weights", b"", "weights is damaged"),
        ("weights", bytes(range(255)) + b"\0", "weights is damaged"),
        ("deeper/config", None, "deeper/config is missing"),
        (SUMS, None, "SHA256SUMS is missing"),
        (SUMS, b"", "SHA256SUMS is empty"),
        (SUMS, b"\xff\xfe", "SHA256SUMS is damaged"),
        (SUMS, b"0  ../outside\n", "SHA256SUMS is damaged"),
    ],
)
@pytest.mark.claim("Names lead nowhere else")
def test_damage_is_named(folder: Path, name: str, content: bytes | None, said: str) -> None:
    (folder.parent / "outside").write_bytes(b"")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert said in str(damage(folder))
    with pytest.raises(UserError, match=r"best is damaged\n.*" + said):
        verify_folder(folder)


def test_what_is_missing_is_said_to_be(tmp_path: Path) -> None:
    assert damage(tmp_path / "nowhere") == "it is missing"


def test_a_copied_seal_is_made_anew(folder: Path) -> None:
    with whole_folder(folder.with_name("copy")) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
        (new / "weights").write_bytes(b"others")
    assert damage(folder.with_name("copy")) is None


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_kill_amid_a_replacement_leaves_the_old_or_the_new(
    folder: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def dies_at(name: str) -> None:
        real = getattr(os, name)

        def step(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls >= call:
                raise KeyboardInterrupt  # from here on nothing happens any more, as after a SIGKILL
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, step)

    def replace() -> None:
        with whole_folder(folder) as new:
            (new / "weights").write_bytes(b"new")
            for name in ("rename", "rmdir", "unlink"):
                dies_at(name)

    with pytest.raises(KeyboardInterrupt):
        replace()
    monkeypatch.undo()
    tidy(folder.parent)
    assert damage(folder) is None
    assert (folder / "weights").read_bytes() == (bytes(range(256)) if call < 3 else b"new")
    assert os.listdir(folder.parent) == ["best"]


def test_half_removed_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (path / "new" / "weights").unlink())
        remove_folder(folder)
    assert not folder.exists()
    assert len(os.listdir(folder.parent)) == 1
    tidy(folder.parent)
    assert os.listdir(folder.parent) == []


def test_tidy_leaves_what_is_no_half_written_file(tmp_path: Path) -> None:
    kept = [".lock", ".wandb_id", "metrics.jsonl", ".metrics.jsonl.short", ".hidden.directory1"]
    for name in (*kept, ".metrics.jsonl.ab_9cdef"):
        (tmp_path / name).write_text("")
    tidy(tmp_path)
    tidy(tmp_path / "nowhere")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_write_that_fails_leaves_nothing_and_names_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = folder.parent / "file"
    write_text(file, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        write_text(file, "new")
    with (
        pytest.raises(OSError, match=f"No space left on device: '{folder}'"),
        whole_folder(folder) as new,
    ):
        (new / "weights").write_bytes(b"new")
    assert file.read_text() == "old"
    assert damage(folder) is None
    assert sorted(os.listdir(folder.parent)) == ["best", "file"]


def test_the_error_of_safetensors_is_the_systems(folder: Path) -> None:
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(OSError, match=f"No space left on device: '{folder}'") as caught,
        whole_folder(folder),
    ):
        raise RuntimeError(said)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="another"), whole_folder(folder):
        raise RuntimeError("another")


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create("", {"kind": "run", "name": "run", "recipe": {"digest": "0"}})
    return run


def test_set_aside_keeps_everything_and_says_so(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in ("one", "two"):
        (run_dir.path / "file").write_text(content)
        run_dir.set_aside(run_dir.path / "file", "it is of no use")
        assert not (run_dir.path / "file").exists()
    (run_dir.path / "file").write_text("three")
    run_dir.set_aside(run_dir.path / "file", "nor is this", copy=True)
    assert (run_dir.path / "file").read_text() == "three"
    kept = {path.name: path.read_text() for path in run_dir.aside.iterdir()}
    assert kept == {"file": "one", "file.2": "two", "file.3": "three"}
    entries = run_dir.read_manifest()["set_aside"]
    assert [(entry["file"], entry["as"]) for entry in entries] == [("file", name) for name in kept]
    assert "file is set aside, in set_aside/file.3: nor is this" in capsys.readouterr().err


def test_a_failure_on_a_full_disk_is_not_hidden_by_its_record(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_dir.manifest.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    run_dir.fail(RuntimeError("boom"))
    assert run_dir.manifest.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "DONE"}, "status is 'DONE'"),
        ({"status_history": None}, "no sound status_history"),
        ({"recipe": {}}, r"no sound recipe\.digest"),
        ({"kind": 3, "name": None}, "no sound kind; no sound name"),
    ],
)
def test_a_manifest_to_go_on_with_is_sound(
    run_dir: RunDir, change: dict[str, object], said: str
) -> None:
    record = run_dir.sound_manifest()
    assert record["status"] == "CREATED"
    write_json(run_dir.manifest, {**record, **change})
    with pytest.raises(UserError, match="manifest is damaged\n.*" + said):
        run_dir.sound_manifest()
    if "status" in change:
        with pytest.raises(UserError, match="manifest is damaged\n.*'DONE' is not a valid Status"):
            run_dir.move_to(Status.RUNNING)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe\x00"])
def test_a_manifest_that_is_none_is_damaged(run_dir: RunDir, content: bytes) -> None:
    run_dir.manifest.write_bytes(content)
    with pytest.raises(UserError, match="manifest is damaged"):
        run_dir.sound_manifest()


@pytest.fixture
def log(tmp_path: Path) -> MetricsFile:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(4):
        file.append({"step": step, "reward": step / 4})
    return file


def test_rows_up_to_a_mark_are_known(log: MetricsFile) -> None:
    mark = log.mark()
    assert log.damage() is log.damage(mark) is None
    log.append({"step": 4})
    with log.path.open("a") as stream:
        stream.write("garbage\n{")
    assert log.damage(mark) is None
    assert log.damage() == "line 6 of metrics.jsonl is damaged"
    log.truncate(9)
    assert [row["step"] for row in log.rows()] == [0, 1, 2, 3, 4]
    assert log.damage(mark) is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b'{"step": 2', b'{"st#p": 2', "line 3 of metrics.jsonl is damaged"),
        (b'{"step": 2', b'{step": 2', "line 3 of metrics.jsonl is damaged"),
        (b"0.25", b"0.35", "metrics.jsonl was changed"),
        (b'{"step": 1, "reward": 0.25}\n', b"", "metrics.jsonl has lost rows: 82 of 110 bytes"),
        (b"5}\n", b"", "metrics.jsonl has lost rows"),
    ],
)
def test_rows_that_are_not_those_of_the_mark(
    log: MetricsFile, old: bytes, new: bytes, said: str
) -> None:
    mark = log.mark()
    content = log.path.read_bytes()
    assert old in content
    head, _, tail = content.rpartition(old) if not new else content.partition(old)
    log.path.write_bytes(head + new + tail)
    found = log.damage(mark)
    assert found is not None
    assert said in found


def test_a_missing_log_has_lost_its_rows(log: MetricsFile) -> None:
    mark = log.mark()
    log.path.unlink()
    assert "lost rows: 0 of 110" in str(log.damage(mark))
    assert log.damage() is None


def test_reading_names_the_damaged_line(log: MetricsFile) -> None:
    log.path.write_bytes(log.path.read_bytes().replace(b'{"step": 1', b'{"step" 1'))
    with pytest.raises(UserError, match=r"line 2 of metrics\.jsonl is damaged"):
        log.rows()
    log.truncate(3)
    assert [row["step"] for row in log.rows()] == [0]
