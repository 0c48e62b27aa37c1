"""Errors that a user can act on."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from functools import partial
from unicodedata import category


class UserError(Exception):
    """Bad input: what is wrong, what was given, what is allowed, and how to fix it.

    Commands print it and exit with status 2.
    """

    def __init__(
        self, what: str, *, got: object = None, allowed: object = None, fix: str | None = None
    ) -> None:
        self.what = what
        self.got = got
        self.allowed = allowed
        self.fix = fix
        super().__init__(str(self))

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles errors between processes, and the default pickling loses keyword arguments.
        build = partial(type(self), got=self.got, allowed=self.allowed, fix=self.fix)
        return build, (self.what,)

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.got is not None:
            lines.append(f"  got:     {self.got}")
        if self.allowed is not None:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix is not None:
            lines.append(f"  fix:     {self.fix}")
        return visible("\n".join(lines))


def visible(text: str) -> str:
    """Return text with control characters as escapes, except line breaks.

    Printed, it cannot move the cursor or hide other text.
    """
    return "".join(
        c if c.isprintable() or c == "\n" or category(c) == "Zs" else ascii(c)[1:-1] for c in text
    )


class MachineError(UserError):
    """A failure of the machine; runs can resume from their checkpoints once it is repaired."""


NO_MEMORY = "the machine ran out of memory"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM}
# Too many open files, in this process or on the machine.
_TOO_MANY = {errno.EMFILE, errno.ENFILE}
# Messages of PyTorch, CUDA and Ray, whose exception types do not tell such failures apart.
_MESSAGES = (
    (
        NO_MEMORY,
        "free memory, or lower sweep.max_concurrent or sweep.pack_size",
        r"DefaultCPUAllocator|Cannot allocate memory|running low on memory",
    ),
    (
        "a node of the Ray cluster was lost",
        "bring the node back, or start the cluster anew",
        r"its node has died",
    ),
    (
        "the GPU or its driver failed",
        "see nvidia-smi and the machine's log",
        (
            r"NVIDIA driver|CUDA driver|No CUDA GPUs are available|no CUDA-capable device"
            r"|uncorrectable (ECC|NVLink) error"
            r"|GPU is lost|fallen off the bus|is/are busy or unavailable"
            r"|system not yet initialized|hardware stack error"
        ),
    ),
)


def machine_error(
    error: BaseException, writes: Iterable[str | os.PathLike[str]] = ()
) -> MachineError | None:
    """Return an error as a failure of the machine, or None if it is a failure of the run.

    A missing permission or a broken disk counts only for files in the folders `writes`, because a
    reward may read or write any file.
    """
    if isinstance(error, UserError):
        return error if isinstance(error, MachineError) else None
    if isinstance(error, OSError):
        return _file_error(error, [os.path.join(os.path.realpath(folder), "") for folder in writes])
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, MemoryError):
        return MachineError(NO_MEMORY, got=text[:300], fix=_MESSAGES[0][1])
    for what, fix, pattern in _MESSAGES:
        if re.search(pattern, text):
            return MachineError(what, got=text[:300], fix=fix)
    return None


def _file_error(error: OSError, folders: list[str]) -> MachineError | None:
    where = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if error.errno in _FULL:
        return MachineError("a file cannot be written", got=where, fix="make room")
    if error.errno in _TOO_MANY:
        return MachineError("too many files are open", got=where, fix="raise the limit: ulimit -n")
    if error.errno == errno.ENOMEM:
        return MachineError(NO_MEMORY, got=where, fix=_MESSAGES[0][1])
    path = (
        os.path.realpath(os.fsdecode(error.filename))
        if isinstance(error.filename, (str, bytes))
        else ""
    )
    if not any(path.startswith(folder) for folder in folders):
        return None
    if error.errno in _NOT_ALLOWED:
        return MachineError(
            "a file cannot be written", got=where, fix="allow this user to write it"
        )
    if error.errno == errno.EIO:
        return MachineError(
            "a file cannot be written", got=where, fix="see the machine's log for the disk's errors"
        )
    return None


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to a mistyped one, or None when none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
