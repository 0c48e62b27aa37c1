"""A study's journal: Optuna's file, with a checksum of all earlier content in every line."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from harness.core.errors import UserError
from harness.core.locks import KernelLock
from harness.records.files import named, sync

_SEALED = re.compile(rb'(.*),"sha256":"([0-9a-f]{16})"}\n', re.DOTALL)


class Journal(JournalFileBackend):
    """Optuna's journal backend with checksums, and with a lock that the kernel frees after a kill.

    Optuna and its dashboard ignore the checksums. Lines that other programs append have none of
    their own; the next line's covers them.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, new or existing.

        A last line that a kill cut short is removed, or the next line would be appended to it.
        Raises UserError, which names the line, when one is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file_lock = KernelLock(path.with_name(f"{path.name}.lock"))
        self._hash = hashlib.sha256()
        self._size = 0
        super().__init__(str(path), lock_obj=self._file_lock)  # type: ignore[arg-type]
        sync(path.parent)
        self._file_lock.acquire()
        try:
            self._read_new_lines()
            if self._size < path.stat().st_size:
                os.truncate(path, self._size)
        finally:
            self._file_lock.release()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append a line for each log: all lines, or none.

        Raises OSError when the disk is full, and leaves the file as it was.
        """
        self._file_lock.acquire()
        try:
            self._read_new_lines()
            hasher, lines = self._hash.copy(), b""
            for log in logs:
                body = json.dumps(log, separators=(",", ":")).encode()[:-1]
                line = body + b',"sha256":"' + _digest(body, hasher) + b'"}\n'
                hasher.update(line)
                lines += line
            self._append(lines)
            self._hash, self._size = hasher, self._size + len(lines)
        finally:
            self._file_lock.release()

    def _append(self, lines: bytes) -> None:
        # Unbuffered: otherwise closing the file would retry what a full disk has refused.
        with named(self._path), self._path.open("ab", buffering=0) as file:
            left = memoryview(lines)
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                # The next line would be appended to half a line.
                os.truncate(self._path, self._size)
                raise

    def _read_new_lines(self) -> None:
        """Read and check the lines that were appended since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._size)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._check(line)
                self._hash.update(line)
                self._size += len(line)

    def _check(self, line: bytes) -> None:
        match = _SEALED.fullmatch(line)
        try:
            is_log = isinstance(json.loads(line), dict)
        except ValueError:
            is_log = False
        if is_log and (match is None or _digest(match[1], self._hash) == match[2]):
            return
        number = self._path.read_bytes()[: self._size].count(b"\n") + 1
        raise UserError(
            f"line {number} of {self._path.name} is damaged",
            got=f"{self._path}: {line[:60]!r}",
            fix="put a copy of the file back; nothing was changed. The trials' own "
            "directories are not affected",
        )


def _digest(body: bytes, before: hashlib._Hash) -> bytes:
    """Return the checksum of a line's body and everything before it."""
    hasher = before.copy()
    hasher.update(body)
    return hasher.hexdigest()[:16].encode()
