"""A lock goes with the process that holds it, whatever that process has left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from harness.core.locks import KernelLock
from harness.core.paths import PROJECT

# Holds a lock, forks a child as a reward may, and is killed.
DIES = """
import os, signal, sys, time
from pathlib import Path
from harness.core.locks import KernelLock
assert KernelLock(Path(sys.argv[1])).acquire(0)
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_child_does_not_keep_its_dead_parents_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DIES, str(tmp_path / ".lock")]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert parent.wait(10) == -signal.SIGKILL
            os.kill(child, 0)  # it lives, and lets go as soon as it runs
            assert KernelLock(tmp_path / ".lock").acquire(10)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_child_that_ends_leaves_its_parent_the_lock(tmp_path: Path) -> None:
    lock = KernelLock(tmp_path / ".lock")
    assert lock.acquire(0)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert not KernelLock(tmp_path / ".lock").acquire(0)
    lock.release()
    assert KernelLock(tmp_path / ".lock").acquire(0)
