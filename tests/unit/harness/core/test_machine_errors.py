"""Failures of the machine are told from failures of what ran on it."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest

from harness.core.errors import NO_MEMORY, MachineError, UserError, machine_error
from harness.records.run_dir import RunDir, Status


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "a file cannot be written"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/elsewhere"), "a file cannot be written"),
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), NO_MEMORY),
        (MemoryError("Unable to allocate 4.00 GiB"), NO_MEMORY),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            NO_MEMORY,
        ),
        (
            RuntimeError(
                "training process 1 of 2 died: The actor died because its node has died. Node Id: 5"
            ),
            "a node",
        ),
        (RuntimeError("Found no NVIDIA driver on your system."), "the GPU or its driver failed"),
        (
            RuntimeError("CUDA error: uncorrectable ECC error encountered"),
            "the GPU or its driver failed",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_failures_of_the_machine(error: Exception, what: str) -> None:
    found = machine_error(error)
    assert found is not None
    assert found.what.startswith(what)
    assert found.fix
    again = pickle.loads(pickle.dumps(found))  # Ray hands it from process to process
    assert machine_error(again) is again
    assert (type(again), str(again)) == (MachineError, str(found))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no luck"),
        UserError("No CUDA GPUs are available, says the recipe"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_failures_of_a_run(error: Exception) -> None:
    assert machine_error(error) is None


def test_a_missing_permission_is_the_machines_where_the_run_writes(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for number in (errno.EACCES, errno.EROFS, errno.EIO):
        ours = OSError(number, os.strerror(number), str(tmp_path / "link" / "metrics.jsonl"))
        rewards = OSError(number, os.strerror(number), str(tmp_path / "runner" / "answers.txt"))
        assert machine_error(ours, writes=[tmp_path / "run"]) is not None
        assert machine_error(rewards, writes=[tmp_path / "run"]) is None


def test_a_run_is_not_failed_by_the_machine(tmp_path: Path) -> None:
    for error, status in (
        (OSError(errno.ENOSPC, "No space"), Status.RUNNING),
        (ValueError("no luck"), Status.FAILED),
    ):
        run = RunDir(tmp_path / status.value)
        run.create("", {"kind": "run"})
        run.move_to(Status.RUNNING)
        run.fail(error)
        assert run.status is status
        assert str(error) in run.read_manifest()["reason"]
