"""Locks that the kernel releases when their holder dies, so that a SIGKILL leaves none behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


class KernelLock:
    """A lock on a file of its own. It belongs to this process alone, not to the children that it
    forks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def acquire(self, seconds: float | None = None) -> bool:
        """Wait for the lock, at most `seconds`; whether it was had."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        deadline = None if seconds is None else time.monotonic() + seconds
        while not _try(descriptor):
            if deadline is not None and time.monotonic() >= deadline:
                os.close(descriptor)
                return False
            time.sleep(0.01)
        self._descriptor = descriptor
        _HELD.add(descriptor)
        return True

    def release(self) -> None:
        """Let the next one in."""
        _HELD.discard(self._descriptor)
        os.close(self._descriptor)


# Descriptors of the locks that this process holds.
_HELD: set[int] = set()


def _let_go_in_child() -> None:
    """A forked child has its parent's descriptors, and with them its locks: it would keep them when
    the parent dies.
    """
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def held(path: Path, *, seconds: float = 0.0) -> Iterator[bool]:
    """Hold a lock inside, if it can be had within `seconds`; yields whether it was."""
    lock = KernelLock(path)
    owned = lock.acquire(seconds)
    try:
        yield owned
    finally:
        if owned:
            lock.release()


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
