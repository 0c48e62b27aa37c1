"""Inject faults into a process: a SIGKILL at a chosen moment, or a full disk.

The moment is a file operation, a call or a write.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that strikes a process.

    `kind`: `file` and `call` kill before the `count`th matching file operation or call, `after` at
    the end of that call; `torn` kills at the `count`th fsync of a matching file with its last `cut`
    bytes not written; `time` kills after so many `seconds` of CPU time; `limit` allows files of at
    most `size` bytes; `count` only lists the file operations.
    """

    kind: str
    target: str = ""
    count: int = 1
    after: bool = False
    cut: int = 12
    seconds: float = 0.0
    size: int = 0


def install(fault: Fault, directory: Path, record: Path) -> None:
    """Install a fault in this process.

    `directory` is the run's or sweep's. The moment of the fault is written to the file `record`.
    """
    if fault.kind in ("file", "count"):
        sys.addaudithook(functools.partial(_watch, fault, directory, record, [0]))
    elif fault.kind == "call":
        _wrap(fault, record)
    elif fault.kind == "torn":
        _tear(fault, record)
    elif fault.kind == "time":
        threading.Thread(target=_wait, args=(fault.seconds, record), daemon=True).start()
    elif fault.kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, fault.size))


def die(record: Path, moment: str) -> None:
    """Write down the moment and end this process by SIGKILL."""
    descriptor = os.open(record, os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(descriptor, moment.encode())
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(seconds: float, record: Path) -> None:
    while time.process_time() < seconds:
        time.sleep(0.001)
    die(record, f"after {time.process_time():.3f} s")


def _watch(
    fault: Fault,
    directory: Path,
    record: Path,
    matches: list[int],
    event: str,
    arguments: tuple[Any, ...],
) -> None:
    operation = _operation(event, arguments, directory)
    if operation is None:
        return
    if fault.kind == "count":
        with open(record, "a") as file:
            file.write(f"{operation}\n")
    elif re.search(fault.target, operation):
        matches[0] += 1
        if matches[0] == fault.count:
            die(record, f"before {operation}")


def _operation(event: str, arguments: tuple[Any, ...], directory: Path) -> str | None:
    """Return `event path` of an audit event that changes a file below a directory, else None."""
    if event == "open":
        path, directory_fd = arguments[0], None
        if not isinstance(arguments[2], int) or not arguments[2] & WRITING:
            return None
    elif event in ("os.rename", "os.link"):
        path, directory_fd = arguments[1], arguments[3]
    elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"):
        path, directory_fd = arguments[0], arguments[-1]
        if event == "os.truncate":
            directory_fd = None
    else:
        return None
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    elif isinstance(directory_fd, int) and directory_fd >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{directory_fd}"), os.fspath(path))
    path = os.path.abspath(os.fsdecode(path))
    below = os.path.relpath(path, directory)
    return None if below.startswith("..") else f"{event.removeprefix('os.')} {below}"


def _wrap(fault: Fault, record: Path) -> None:
    module, _, name = fault.target.partition(":")
    *owners, attribute = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original: Callable[..., Any] = getattr(owner, attribute)
    calls = 0

    @functools.wraps(original)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        matches = calls == fault.count
        if matches and not fault.after:
            die(record, f"before call {fault.count} of {name}")
        result = original(*arguments, **options)
        if matches:
            die(record, f"after call {fault.count} of {name}")
        return result

    setattr(owner, attribute, wrapped)


def _tear(fault: Fault, record: Path) -> None:
    fsync, calls = os.fsync, 0

    def torn(descriptor: int) -> None:
        nonlocal calls
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if re.search(fault.target, path):
            calls += 1
            if calls == fault.count:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - fault.cut)
                die(record, f"amid write {fault.count} of {os.path.basename(path)}")
        fsync(descriptor)

    setattr(os, "fsync", torn)  # noqa: B010
