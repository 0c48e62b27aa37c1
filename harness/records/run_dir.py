"""The layout of a run directory, its manifest, and the state machine of a run's status."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from harness.config.schema import Recipe
from harness.core.errors import UserError, machine_error
from harness.core.locks import held
from harness.core.paths import locate_folder, shown
from harness.records.files import sync, tidy, write_json, write_text


class Status(Enum):
    """Status of a run, a trial or a sweep.

    COMPLETE, PRUNED and FAILED are final, but a FAILED run and a COMPLETE sweep can be resumed.
    """

    CREATED = "CREATED"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"


# RUNNING -> RUNNING is a run that was killed and is resumed.
_NEXT = {
    Status.CREATED: {Status.RUNNING, Status.FAILED, Status.PRUNED},
    Status.RUNNING: {Status.RUNNING, Status.COMPLETE, Status.PRUNED, Status.FAILED},
    Status.FAILED: {Status.RUNNING, Status.FAILED},
    Status.PRUNED: set(),
    Status.COMPLETE: set(),
}


def one_line(error: Exception) -> str:
    """Return an error's message on one line of about 500 characters at most."""
    text = " ".join(str(error).removeprefix("error: ").split())[:500] or "no message"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def now() -> str:
    """Return the time in UTC as ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def run_dir_for(recipe: Recipe, source: str | Path) -> RunDir:
    """Return the directory of a new run or sweep: `trainer.ckpt_path`/`trainer.run_name`.

    The default is runs/<recipe>-<time>.
    """
    name = recipe.trainer.run_name or f"{Path(source).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    return RunDir(Path(recipe.trainer.ckpt_path) / name)


def adapter_folder(path: str) -> Path | None:
    """Return the folder with the files of an adapter that a recipe names; None where there is none.

    The path is that of a folder with these files, of a run's directory, which stands for its final
    adapter, or a hub's name, of which the cache has a copy.
    """
    folder = locate_folder(path, "adapter_config.json")
    if folder is None:
        return None
    run_dir = RunDir(folder)
    return run_dir.adapter / "final" if run_dir.manifest.exists() else folder


class RunDir:
    """The directory of a run, a trial or a sweep: its paths, and its manifest with the status."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        self.recipe = self.path / "recipe.yaml"
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.start_adapter = self.adapter / "start"
        self.log = self.path / "log.txt"
        self.aside = self.path / "set_aside"
        # Of a sweep only:
        self.journal = self.path / "study.journal"
        self.trials = self.path / "trials"
        self.packs = self.path / "packs"
        self.results = self.path / "results.parquet"
        self.report = self.path / "report"

    def eval_samples(self, step: int) -> Path:
        """Return the path of the completions kept from a step's evaluation."""
        return self.samples / f"step_{step:06d}.parquet"

    def trial(self, number: int) -> RunDir:
        """Return the directory of a trial of this sweep."""
        return RunDir(self.trials / f"{number:04d}")

    @contextlib.contextmanager
    def locked(self, message: str) -> Iterator[None]:
        """Make the directory and hold its lock; only its holder writes there.

        Raises UserError with a message when another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        with held(self.path / ".lock") as acquired:
            if not acquired:
                raise UserError(
                    message,
                    got=shown(self.path),
                    fix="wait for it, or choose another trainer.run_name",
                )
            yield

    def create(self, recipe_yaml: str, manifest: dict[str, Any]) -> None:
        """Make the directory with recipe and manifest, status CREATED.

        Raises UserError when it cannot be written.
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
        """Return the manifest; raises UserError when there is none or it is damaged."""
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
        """Return the manifest of a run that is to be resumed.

        Raises UserError when a field that this needs is damaged.
        """
        record = self.read_manifest()
        needed = {"kind": str, "name": str, "status": str, "status_history": list, "recipe": dict}
        wrong = [
            f"no sound {name}"
            for name, kind in needed.items()
            if not isinstance(record.get(name), kind)
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
            fix="restore it from a copy, or choose another trainer.run_name; nothing here "
            "was changed",
        )

    def update(self, **values: Any) -> None:
        """Set top-level fields of the manifest."""
        write_json(self.manifest, {**self.read_manifest(), **values})

    def fail(self, error: Exception) -> None:
        """Change the status to FAILED, or to RUNNING when the machine failed, with the reason.

        On a full disk the manifest may stay as it was.
        """
        status = Status.RUNNING if machine_error(error, writes=[self.path]) else Status.FAILED
        with contextlib.suppress(OSError):
            self.move_to(status, reason=one_line(error))

    def tidy(self) -> None:
        """Remove temporary files that kills left; only for the process that writes here."""
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
        """Move a damaged file or folder to `set_aside/`, record why, and print a note.

        With `copy` a file also stays where it is.
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
        """Return the status in the manifest; raises UserError when it has none."""
        return self._status_in(self.read_manifest())

    def move_to(self, status: Status, *, reason: str | None = None, **values: Any) -> None:
        """Change the status, with a reason, and set other fields of the manifest.

        Raises ValueError for a change that the state machine does not allow.
        """
        manifest = self.read_manifest()
        old = self._status_in(manifest)
        sweep_goes_on = manifest.get("kind") == "sweep" and (old, status) == (
            Status.COMPLETE,
            Status.RUNNING,
        )
        if status not in _NEXT[old] and not sweep_goes_on:
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
