"""Layout of a run directory, atomic writes, checksums of folders, and the state machine of a run's
status.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from harness.config.schema import Recipe
from harness.core.errors import UserError, machine_error
from harness.core.locks import held
from harness.core.paths import shown


class Status(Enum):
    """Where a run stands. COMPLETE, PRUNED and FAILED are final; FAILED may be resumed, a COMPLETE
    sweep given more.
    """

    CREATED = "CREATED"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"


# RUNNING -> RUNNING is a run that was killed and goes on.
_NEXT = {
    Status.CREATED: {Status.RUNNING, Status.FAILED, Status.PRUNED},
    Status.RUNNING: {Status.RUNNING, Status.COMPLETE, Status.PRUNED, Status.FAILED},
    Status.FAILED: {Status.RUNNING, Status.FAILED},
    Status.PRUNED: set(),
    Status.COMPLETE: set(),
}


SUMS = "SHA256SUMS"
# What `write_bytes` and `whole_folder` call a file or folder that is not whole yet.
_UNFINISHED = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, synced, then renamed; OSError
    names the file.
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
    """Give an OSError the name of what was to be written: a full disk is found by calls that know
    no name.
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
    """Have a file's content, or a folder's names, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(folder: Path, *, sealed: bool = True) -> Iterator[Path]:
    """Write a folder whole or not at all, in place of what was there: yields a temporary one,
    renamed at the end.

    `sealed`: with the files' checksums in `SHA256SUMS`, and on disk; without, for what is of no use
    after a crash. OSError names the folder.
    """
    with named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            # Not the temporary folder itself, which only its owner may read.
            new = temporary / "new"
            new.mkdir()
            yield new
            for file in new.rglob("*"):
                if file.is_file():
                    file.chmod(
                        0o644
                        # safetensors lets the owner alone read its files; a server may be another
                        # user
                    )
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
    """Remove a folder; a kill half way leaves nothing of it under its name."""
    doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    os.rename(folder, doomed / "new")
    shutil.rmtree(doomed)


def tidy(parent: Path) -> None:
    """Clear what kills amid writing left in a folder; where one fell between two renames, the old
    folder comes back.

    Only for who alone writes there.
    """
    for left in list(parent.iterdir()) if parent.is_dir() else ():
        name = _UNFINISHED.fullmatch(left.name)
        if name is None:
            continue
        if (left / "old").is_dir() and not (parent / name[1]).exists():
            os.rename(left / "old", parent / name[1])
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def seal(folder: Path) -> None:
    """Write the checksums of all files in a folder beside them, and have everything on disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    (folder / SUMS).write_text(
        "".join(f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in files)
    )
    for path in (*folder.rglob("*"), folder):
        sync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that was sealed; None when every file is as it was written."""
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
    """Raise UserError, naming the file, unless a sealed folder (an adapter, a checkpoint) is as it
    was written.
    """
    wrong = damage(folder)
    if wrong is not None:
        raise UserError(f"{folder.name} is damaged", got=f"{folder}: {wrong}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def one_line(error: Exception) -> str:
    """What went wrong, in a line of at most 500 characters or so."""
    text = " ".join(str(error).removeprefix("error: ").split())[:500] or "no message"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def now() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def place(recipe: Recipe, source: str | Path) -> RunDir:
    """Where a run or sweep goes: `trainer.ckpt_path`/`trainer.run_name`, by default
    runs/<recipe>-<time>.
    """
    name = recipe.trainer.run_name or f"{Path(source).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    return RunDir(Path(recipe.trainer.ckpt_path) / name)


class RunDir:
    """One run's or one sweep's directory; paths only, plus the manifest as its record of status."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        self.recipe = self.path / "recipe.yaml"
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.log = self.path / "log.txt"
        self.aside = self.path / "set_aside"
        # A sweep's own:
        self.journal = self.path / "study.journal"
        self.trials = self.path / "trials"
        self.packs = self.path / "packs"
        self.results = self.path / "results.parquet"
        self.report = self.path / "report"

    def eval_samples(self, step: int) -> Path:
        """The file of the completions kept from a step's evaluation."""
        return self.samples / f"step_{step:06d}.parquet"

    def trial(self, number: int) -> RunDir:
        """The directory of a sweep's trial."""
        return RunDir(self.trials / f"{number:04d}")

    @contextlib.contextmanager
    def locked(self, taken: str) -> Iterator[None]:
        """Hold the directory's lock inside, which goes before all that is written there; makes the
        directory.

        Raises UserError, saying `taken`, when another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        with held(self.path / ".lock") as mine:
            if not mine:
                raise UserError(
                    taken,
                    got=shown(self.path),
                    fix="wait for it, or choose another trainer.run_name",
                )
            yield

    def create(self, recipe_yaml: str, manifest: dict[str, Any]) -> None:
        """Make the directory with recipe and manifest, status CREATED; raises UserError when it
        cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe, recipe_yaml)
            write_json(
                self.manifest,
                {
                    **manifest,
                    "status": Status.CREATED.value,
                    "status_history": [{"status": Status.CREATED.value, "time": now()}],
                },
            )
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            "cannot write the run directory",
            got=f"{self.path}: {error.strerror}",
            fix="name another place with trainer.ckpt_path=...",
        )

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; raises UserError when there is none or it is damaged."""
        try:
            record: dict[str, Any] = json.loads(self.manifest.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError("not a run directory: it has no manifest.json", got=self.path) from None
        except OSError as error:
            raise UserError(
                "the manifest cannot be read", got=f"{self.manifest}: {error.strerror}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from None
        if not isinstance(record, dict):
            raise self._damaged("it is no object")
        return record

    def sound_manifest(self) -> dict[str, Any]:
        """The manifest of what is to be gone on with; raises UserError when a part that this needs
        is damaged.
        """
        record = self.read_manifest()
        needed = {"kind": str, "name": str, "status": str, "status_history": list, "recipe": dict}
        given = record if isinstance(record, dict) else {}
        wrong = [
            f"no sound {name}"
            for name, kind in needed.items()
            if not isinstance(given.get(name), kind)
        ]
        if not wrong and record["status"] not in {status.value for status in Status}:
            wrong = [f"status is {record['status']!r}"]
        if not wrong and not isinstance(record["recipe"].get("digest"), str):
            wrong = ["no sound recipe.digest"]
        if wrong:
            raise self._damaged("; ".join(wrong))
        return record

    def _status_in(self, record: dict[str, Any]) -> Status:
        try:
            return Status(record.get("status"))
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, how: str) -> UserError:
        return UserError(
            "the manifest is damaged",
            got=f"{self.manifest}: {how}",
            fix="put a copy of it back, or choose another trainer.run_name; nothing here "
            "was changed",
        )

    def update(self, **values: Any) -> None:
        """Set top-level fields of the manifest."""
        write_json(self.manifest, {**self.read_manifest(), **values})

    def fail(self, error: Exception) -> None:
        """Move to FAILED, with the exception on one line as the reason; to RUNNING where the
        machine failed.

        On a full disk the manifest may stay as it was.
        """
        status = Status.RUNNING if machine_error(error, writes=[self.path]) else Status.FAILED
        with contextlib.suppress(OSError):
            self.move_to(status, reason=one_line(error))

    def tidy(self) -> None:
        """Clear what kills amid writing left; for the one process that writes here."""
        for folder in (
            self.path,
            self.samples,
            self.checkpoints,
            self.adapter,
            self.report,
            self.report / "figures",
        ):
            tidy(folder)

    def set_aside(self, path: Path, why: str, *, copy: bool = False) -> None:
        """Keep what is damaged under `set_aside/`, out of the way, and say so; `copy` leaves it
        where it is too.
        """
        self.aside.mkdir(exist_ok=True)
        place = self.aside / path.name
        for number in range(2, 10_000):
            if not place.exists():
                break
            place = self.aside / f"{path.name}.{number}"
        if copy:
            shutil.copy(path, place)
        else:
            os.rename(path, place)
        sync(self.aside)
        entry = {
            "file": str(path.relative_to(self.path)),
            "why": why,
            "as": place.name,
            "time": now(),
        }
        self.update(set_aside=[*self.read_manifest().get("set_aside", []), entry])
        print(
            f"{entry['file']} is set aside, in set_aside/{place.name}: {why}",
            file=sys.stderr,
            flush=True,
        )

    @property
    def status(self) -> Status:
        """The status the manifest records; raises UserError when it records none."""
        return self._status_in(self.read_manifest())

    def move_to(self, status: Status, *, reason: str | None = None, **values: Any) -> None:
        """Change the status, with why; raises ValueError for a change the state machine does not
        know.
        """
        manifest = self.read_manifest()
        old = self._status_in(manifest)
        more = manifest.get("kind") == "sweep" and (old, status) == (
            Status.COMPLETE,
            Status.RUNNING,
        )
        if status not in _NEXT[old] and not more:
            raise ValueError(f"a run does not go from {old.value} to {status.value}")
        entry = {"status": status.value, "time": now()} | ({"reason": reason} if reason else {})
        write_json(
            self.manifest,
            {
                **manifest,
                **values,
                "status": status.value,
                "reason": reason,
                "status_history": [*manifest["status_history"], entry],
            },
        )
