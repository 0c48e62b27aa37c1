"""Files and folders that are written whole or not at all, and checksums that find damage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.core.errors import UserError

SUMS = "SHA256SUMS"
# What `write_bytes` and `whole_folder` call a file or folder that is not whole yet.
_UNFINISHED = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file that is synced, then renamed.

    An OSError names the file.
    """
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Give an OSError raised inside the name of the file or folder being written.

    Calls such as fsync, which find a full disk, know no file name.
    """
    try:
        yield
    except OSError as error:
        known = error.filename is not None and not str(error.filename).startswith(
            f"{path.parent}/.{path.name}."
        )
        if error.errno is None or known:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        # Safetensors' own error has the system's number in its text alone.
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(folder: Path, *, sealed: bool = True) -> Iterator[Path]:
    """Write a folder whole or not at all; yields a temporary folder that then replaces `folder`.

    `sealed` folders have the checksums of their files in `SHA256SUMS`, and are synced to disk; the
    others are for what a crash makes useless. An OSError names the folder.
    """
    with named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            # mkdtemp's own folder can be read by its owner only.
            new = temporary / "new"
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    # Safetensors makes files that their owner alone can read.
                    file.chmod(0o644)
            if sealed:
                seal(new)
            if folder.exists():
                os.rename(folder, temporary / "old")
            os.rename(new, folder)
            if sealed:
                sync(folder.parent)
        finally:
            shutil.rmtree(temporary)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a kill half way leaves no part of it under its name."""
    doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    os.rename(folder, doomed / "new")
    shutil.rmtree(doomed)


def tidy(parent: Path) -> None:
    """Remove temporary files that kills left in a folder.

    After a kill between the two renames of `whole_folder`, the old folder comes back. Only for a
    process that alone writes there.
    """
    for path in list(parent.iterdir()) if parent.is_dir() else ():
        match = _UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        if (path / "old").is_dir() and not (parent / match[1]).exists():
            os.rename(path / "old", parent / match[1])
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def seal(folder: Path) -> None:
    """Write `SHA256SUMS`, the checksums of all files in a folder, and sync everything to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    (folder / SUMS).write_text(
        "".join(f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in files)
    )
    for path in (*folder.rglob("*"), folder):
        sync(path)


def damage(folder: Path) -> str | None:
    """Return what is wrong with a sealed folder; None when every file is as it was written."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return f"{SUMS} is missing" if folder.is_dir() else "it is missing"
    except UnicodeDecodeError:
        return f"{SUMS} is damaged"
    for line in lines:
        digest, _, name = line.partition("  ")
        if not name or not (folder / name).resolve().is_relative_to(folder.resolve()):
            return f"{SUMS} is damaged"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is damaged: its SHA-256 is not the one that was written"
    return None if lines else f"{SUMS} is empty"


def verify_folder(folder: Path) -> None:
    """Raise UserError naming the file when a sealed folder is not as it was written."""
    wrong = damage(folder)
    if wrong is not None:
        raise UserError(f"{folder.name} is damaged", got=f"{folder}: {wrong}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")
