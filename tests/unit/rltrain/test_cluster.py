"""What Ray's processes inherit, and what a killed one left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from harness.paths import PROJECT
from rltrain import cluster

HOLD = "import sys, time; file = open(sys.argv[1], 'w'); print('open', flush=True); time.sleep(60)"


def test_a_process_left_behind_is_found_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real" / "noregret").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    root = tmp_path / "link" / "noregret"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(root / "log")], stdout=subprocess.PIPE, text=True) as left:
        assert left.stdout is not None
        assert left.stdout.readline() == "open\n"
        cluster._clear(root)
        # `_clear` has waited for its end.
        gone = not psutil.pid_exists(left.pid)
        left.kill()
    assert gone
    assert not root.exists()


def test_an_installed_project_is_not_put_before_pythons_own_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    monkeypatch.setattr(cluster, "INSTALLED", True)
    environment = cluster.worker_environment(1)
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "/somewhere/else"]


def test_workers_find_the_project_and_the_users_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    environment = cluster.worker_environment(3, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment["PYTHONPATH"].split(":") == [str(PROJECT), str(tmp_path), "/somewhere/else"]
    assert environment["OMP_NUM_THREADS"] == "3"


def test_rays_directory_is_short_and_the_sweeps_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, other = cluster._scratch(tmp_path / "one"), cluster._scratch(tmp_path / "other")
    assert one != other
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("deep" * 20)))
    assert len(str(cluster._scratch(tmp_path / "one"))) < 40
