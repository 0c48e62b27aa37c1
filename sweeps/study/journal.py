"""A study's journal: Optuna's file, in which every line ends with a checksum of all that stands
before it.
"""

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
    """Optuna's journal backend with checksums, which Optuna and its dashboard read past; kills
    leave no lock behind.

    Lines that others append have none, and are covered by the next one's.
    """

    def __init__(self, path: Path) -> None:
        """Open a journal, new or existing; raises UserError naming the line when one is damaged.

        A last line that a kill cut short is taken off: the next would be appended to it, and
        neither be readable.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._own_lock = KernelLock(path.with_name(f"{path.name}.lock"))
        self._total = hashlib.sha256()
        self._size = 0
        super().__init__(str(path), lock_obj=self._own_lock)  # type: ignore[arg-type]
        sync(path.parent)
        self._own_lock.acquire()
        try:
            self._read_on()
            if self._size < path.stat().st_size:
                os.truncate(path, self._size)
        finally:
            self._own_lock.release()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append one line a log, all or none of them; OSError when the disk is full, with the file
        as it was.
        """
        self._own_lock.acquire()
        try:
            self._read_on()
            total, lines = self._total.copy(), b""
            for log in logs:
                line = _sealed(json.dumps(log, separators=(",", ":")).encode(), total)
                total.update(line)
                lines += line
            self._append(lines)
            self._total, self._size = total, self._size + len(lines)
        finally:
            self._own_lock.release()

    def _append(self, lines: bytes) -> None:
        # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
        with named(self._path), self._path.open("ab", buffering=0) as file:
            left = memoryview(lines)
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                # Half a line would spoil the one that comes after it.
                os.truncate(self._path, self._size)
                raise

    def _read_on(self) -> None:
        """Check what stands after the last line that is known."""
        with self._path.open("rb") as file:
            file.seek(self._size)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._check(line)
                self._total.update(line)
                self._size += len(line)

    def _check(self, line: bytes) -> None:
        match = _SEALED.fullmatch(line)
        try:
            known = isinstance(json.loads(line), dict)
        except ValueError:
            known = False
        if known and (match is None or _digest(match[1], self._total) == match[2]):
            return
        number = self._path.read_bytes()[: self._size].count(b"\n") + 1
        raise UserError(
            f"line {number} of {self._path.name} is damaged",
            got=f"{self._path}: {line[:60]!r}",
            fix="put a copy of the file back; nothing was changed. The trials' own "
            "directories are not affected",
        )


def _sealed(log: bytes, before: hashlib._Hash) -> bytes:
    """A log as a line that ends with the checksum of everything up to there."""
    return log[:-1] + b',"sha256":"' + _digest(log[:-1], before) + b'"}\n'


def _digest(body: bytes, before: hashlib._Hash) -> bytes:
    total = before.copy()
    total.update(body)
    return total.hexdigest()[:16].encode()
