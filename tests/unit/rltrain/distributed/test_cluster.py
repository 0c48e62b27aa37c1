"""The environment of Ray's processes, and removal of what killed commands left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from harness.core.paths import PROJECT
from rltrain.distributed import cluster

# A command that has Ray's folder, and a process that writes there and outlives it.
HOLD = """
import subprocess, sys, time
from rltrain.distributed import cluster
with cluster._own_folder() as root:
    left = subprocess.Popen([sys.executable, "-c", "import sys, time; sys.stdout.write('up'); time.sleep(60)"],
                            stdout=(root / "log").open("w"))
    print(root, left.pid, flush=True)
    time.sleep(60)
"""  # noqa: E501


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files with a path short enough for Ray, reached through a link as
    macOS's /tmp is.
    """
    real = Path(tempfile.mkdtemp(dir="/tmp"))
    link = real.with_suffix(".l")
    link.symlink_to(real)
    monkeypatch.setenv("TMPDIR", str(link))
    monkeypatch.setattr(tempfile, "tempdir", str(link))
    yield link
    link.unlink()
    shutil.rmtree(real)


@contextlib.contextmanager
def holding() -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """A command that has Ray's folder: its process, the folder, and the process that
    writes there.
    """
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        root, left = command.stdout.readline().split()
        yield command, Path(root), int(left)
        command.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(left), signal.SIGKILL)


def test_the_next_start_clears_what_a_killed_one_left_and_nothing_else(place: Path) -> None:
    with holding() as (killed, root, left), holding() as (_, other, at_work):
        assert {root, other} == set(cluster.folders())
        assert root.stat().st_mode & 0o777 == 0o700
        killed.kill()
        killed.wait()
        (place / f"{cluster.PREFIX}12345678").symlink_to("/etc")  # not a folder of ours
        cluster.clear_left_over()
        assert not root.exists()
        assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
        assert cluster.folders() == [other]
        assert psutil.Process(at_work).is_running()


def test_an_installed_project_is_not_put_before_pythons_own_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    monkeypatch.setattr(cluster, "INSTALLED", True)
    environment = cluster.worker_environment(1)
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "/somewhere/else"]


def test_workers_find_the_project_and_the_users_modules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    environment = cluster.worker_environment(3, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment["PYTHONPATH"].split(":") == [str(PROJECT), str(tmp_path), "/somewhere/else"]
    assert environment["OMP_NUM_THREADS"] == "3"


def test_rays_directory_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("deep" * 20)))
    with cluster._own_folder() as root:
        assert len(str(root)) < 40
    assert not root.exists()
