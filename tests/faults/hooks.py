"""Faults that strike a process from within: a SIGKILL at a chosen file operation, call or write, or
a full disk.
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
    """What befalls a process.

    `kind`: `file` and `call` kill before the `count`th matching file operation or call, `after` at
    the end of that call; `torn` kills at the `count`th fsync of a matching file with its last `cut`
    bytes not written; `time` kills after so many `seconds` of computing; `limit` allows files of at
    most `size` bytes; `count` only writes the file operations down.
    """

    kind: str
    target: str = ""
    count: int = 1
    after: bool = False
    cut: int = 12
    seconds: float = 0.0
    size: int = 0


def install(fault: Fault, directory: Path, told: Path) -> None:
    """Arm a fault in this process: `directory` is the run's or sweep's, the file `told` gets the
    moment it struck.
    """
    if fault.kind in ("file", "count"):
        sys.addaudithook(functools.partial(_watch, fault, directory, told, [0]))
    elif fault.kind == "call":
        _wrap(fault, told)
    elif fault.kind == "torn":
        _tear(fault, told)
    elif fault.kind == "time":
        threading.Thread(target=_wait, args=(fault.seconds, told), daemon=True).start()
    elif fault.kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, fault.size))


def die(told: Path, moment: str) -> None:
    """Write down the moment, and be gone as by SIGKILL."""
    descriptor = os.open(told, os.O_CREAT | os.O_WRONLY, 0o644)
    os.write(descriptor, moment.encode())
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(seconds: float, told: Path) -> None:
    while time.process_time() < seconds:
        time.sleep(0.001)
    die(told, f"after {time.process_time():.3f} s")


def _watch(
    fault: Fault,
    directory: Path,
    told: Path,
    seen: list[int],
    event: str,
    arguments: tuple[Any, ...],
) -> None:
    operation = _operation(event, arguments, directory)
    if operation is None:
        return
    if fault.kind == "count":
        with open(told, "a") as file:
            file.write(f"{operation}\n")
    elif re.search(fault.target, operation):
        seen[0] += 1
        if seen[0] == fault.count:
            die(told, f"before {operation}")


def _operation(event: str, arguments: tuple[Any, ...], directory: Path) -> str | None:
    """`event path` of an audit event that changes a file below a directory; None for any other."""
    if event == "open":
        path, place = arguments[0], None
        if not isinstance(arguments[2], int) or not arguments[2] & WRITING:
            return None
    elif event in ("os.rename", "os.link"):
        path, place = arguments[1], arguments[3]
    elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"):
        path, place = arguments[0], arguments[-1]
        if event == "os.truncate":
            place = None
    else:
        return None
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    elif isinstance(place, int) and place >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{place}"), os.fspath(path))
    path = os.path.abspath(os.fsdecode(path))
    below = os.path.relpath(path, directory)
    return None if below.startswith("..") else f"{event.removeprefix('os.')} {below}"


def _wrap(fault: Fault, told: Path) -> None:
    module, _, name = fault.target.partition(":")
    *owners, attribute = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original: Callable[..., Any] = getattr(owner, attribute)
    seen = 0

    @functools.wraps(original)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        mine = seen == fault.count
        if mine and not fault.after:
            die(told, f"before call {fault.count} of {name}")
        result = original(*arguments, **options)
        if mine:
            die(told, f"after call {fault.count} of {name}")
        return result

    setattr(owner, attribute, wrapped)


def _tear(fault: Fault, told: Path) -> None:
    fsync, seen = os.fsync, 0

    def torn(descriptor: int) -> None:
        nonlocal seen
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if re.search(fault.target, path):
            seen += 1
            if seen == fault.count:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - fault.cut)
                die(told, f"amid write {fault.count} of {os.path.basename(path)}")
        fsync(descriptor)

    setattr(os, "fsync", torn)  # noqa: B010
