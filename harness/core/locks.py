"""Locks that the kernel releases when their holder dies, even by SIGKILL."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path


class KernelLock:
    """A lock on a file. It belongs to this process, not to the children that it forks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def acquire(self, seconds: float | None = None) -> bool:
        """Wait for the lock, at most `seconds`; return whether it was acquired."""
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
        """Release the lock."""
        _HELD.discard(self._descriptor)
        os.close(self._descriptor)


# Descriptors of the locks that this process holds.
_HELD: set[int] = set()


def _let_go_in_child() -> None:
    """Close the descriptors of locks in a forked child.

    Otherwise the child would keep its parent's locks after the parent's death.
    """
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def held(path: Path, *, seconds: float = 0.0) -> Iterator[bool]:
    """Hold a lock if it can be acquired within `seconds`; yields whether it was."""
    lock = KernelLock(path)
    acquired = lock.acquire(seconds)
    try:
        yield acquired
    finally:
        if acquired:
            lock.release()


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
