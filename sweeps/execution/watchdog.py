"""The watchdog of a training process: it ends one that makes no progress and logs where it hung."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from pathlib import Path

_STDERR = 2
# How faulthandler begins its report.
_TIMEOUT = b"Timeout ("
_LAST_BYTES = 1 << 16


def watch(seconds: float) -> None:
    """End this process in `seconds`, its stacks on stderr, unless called again or stopped.

    The timer is a thread of C code: it fires even where Python's threads cannot run.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)


def stop_watching() -> None:
    """Stop the timer."""
    faulthandler.cancel_dump_traceback_later()


def hung(log: Path) -> bool:
    """Return whether the watchdog ended the process that wrote this log."""
    if not log.is_file():
        return False
    with log.open("rb") as file:
        file.seek(max(0, os.path.getsize(log) - _LAST_BYTES))
        return any(line.startswith(_TIMEOUT) for line in file.read().splitlines())


def oom_kills() -> int:
    """Return how many processes the kernel has ended out of memory, by its own counters."""
    counts = [0]
    for file in (
        "/proc/vmstat",
        "/sys/fs/cgroup/memory.events",
        "/sys/fs/cgroup/memory/memory.oom_control",
    ):
        with contextlib.suppress(OSError):
            lines = Path(file).read_text().splitlines()
            counts += [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
    return sum(counts)
