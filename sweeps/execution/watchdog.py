"""A watch over a trial's process from within: one that makes no progress ends, and its log says
where it hung.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
from pathlib import Path

_STDERR = 2
_TOLD = b"Timeout ("
_LAST_BYTES = 1 << 16


def watch(seconds: float) -> None:
    """End this process, with the stack of every thread on stderr, unless called again or stopped
    within `seconds`.

    The timer is a thread of C code: it fires even where Python's own threads cannot run.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)


def stop_watching() -> None:
    """The process may wait for as long as it likes."""
    faulthandler.cancel_dump_traceback_later()


def hung(log: Path) -> bool:
    """Whether a process that wrote this log was ended by its watch."""
    if not log.is_file():
        return False
    with log.open("rb") as file:
        file.seek(max(0, os.path.getsize(log) - _LAST_BYTES))
        return any(line.startswith(_TOLD) for line in file.read().splitlines())


def oom_kills() -> int:
    """How many processes the kernel has ended for want of memory, as far as it says so."""
    counts = [0]
    for place in (
        "/proc/vmstat",
        "/sys/fs/cgroup/memory.events",
        "/sys/fs/cgroup/memory/memory.oom_control",
    ):
        with contextlib.suppress(OSError):
            lines = Path(place).read_text().splitlines()
            counts += [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
    return sum(counts)
