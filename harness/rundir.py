"""Layout of a run directory, atomic writes, and the state machine of a run's status."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.schema import Recipe


class Status(Enum):
    """Where a run stands. COMPLETE, PRUNED and FAILED are final; a FAILED run may be resumed."""

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


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder whole or not at all, in place of what was there: yields a temporary one, renamed at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        # Not the temporary folder itself, which only its owner may read.
        new = temporary / "new"
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors lets the owner alone read its files; a server may be another user
        if folder.exists():
            os.rename(folder, temporary / "old")
        os.rename(new, folder)
    finally:
        shutil.rmtree(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def now() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def place(recipe: Recipe, source: str | Path) -> RunDir:
    """Where a run or sweep goes: `trainer.ckpt_path`/`trainer.run_name`, by default runs/<recipe>-<time>."""
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
        # A sweep's own:
        self.journal = self.path / "study.journal"
        self.trials = self.path / "trials"
        self.results = self.path / "results.parquet"
        self.report = self.path / "report"

    def eval_samples(self, step: int) -> Path:
        """The file of the completions kept from a step's evaluation."""
        return self.samples / f"step_{step:06d}.parquet"

    def trial(self, number: int) -> RunDir:
        """The directory of a sweep's trial."""
        return RunDir(self.trials / f"{number:04d}")

    def create(self, recipe_yaml: str, manifest: dict[str, Any]) -> None:
        """Make the directory with recipe and manifest, status CREATED; raises UserError when it cannot be written."""
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
            raise UserError(
                "cannot write the run directory",
                got=f"{self.path}: {error.strerror}",
                fix="name another place with trainer.ckpt_path=...",
            ) from None

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; raises UserError when there is none or it is damaged."""
        try:
            record: dict[str, Any] = json.loads(self.manifest.read_text())
            return record
        except FileNotFoundError:
            raise UserError("not a run directory: it has no manifest.json", got=self.path) from None
        except json.JSONDecodeError as error:
            raise UserError("the manifest is damaged", got=f"{self.manifest}: {error}") from None

    def update(self, **values: Any) -> None:
        """Set top-level fields of the manifest."""
        write_json(self.manifest, {**self.read_manifest(), **values})

    def fail(self, error: Exception) -> None:
        """Move to FAILED, with the exception on one line as the reason."""
        text = " ".join(str(error).removeprefix("error: ").split())[:500] or "no message"
        self.move_to(Status.FAILED, reason=text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")

    @property
    def status(self) -> Status:
        """The status the manifest records."""
        return Status(self.read_manifest()["status"])

    def move_to(self, status: Status, *, reason: str | None = None, **values: Any) -> None:
        """Change the status, with why; raises ValueError for a change the state machine does not know."""
        manifest = self.read_manifest()
        old = Status(manifest["status"])
        if status not in _NEXT[old]:
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
