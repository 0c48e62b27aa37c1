"""Weights & Biases runs, offline by default."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.loggers.base import RunLogger
from harness.records.files import write_text
from harness.records.run_dir import RunDir, Status

WandBMode = Literal["offline", "online", "disabled"]
# W&B's own code for a run that was interrupted is 255.
_EXIT_CODES = {Status.COMPLETE: 0, Status.PRUNED: 0, Status.FAILED: 1}


class WandB(RunLogger):
    """Writes a W&B run in the run's `wandb/`; a resumed run keeps its W&B id.

    Offline, a process that resumes a run writes a new file with all rows so far. Rows that a kill
    cut off are then there, and the others are there twice. Online, rows that the server has are
    not logged again.
    """

    def __init__(
        self, recipe: Recipe, run_dir: RunDir, *, group: str | None, mode: WandBMode
    ) -> None:
        # W&B reads these when it is imported: no messages on the console, no error reports sent.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "WANDB_MODE=online needs an API key", fix="wandb login, or WANDB_MODE=offline"
            )
        id_file = run_dir.path / "wandb" / "run_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(5)
        try:
            self._run = wandb.init(
                project=recipe.trainer.project_name,
                name=run_dir.path.name,
                group=group,
                id=run_id,
                dir=str(run_dir.path),
                config=recipes.to_dict(recipe),
                mode=mode,
                resume="allow" if mode == "online" else None,
                reinit="create_new",
                # Commit and packages are in the manifest. By itself W&B writes to disk every 15
                # seconds.
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    x_save_requirements=False,
                    x_transaction_log_flush_interval=1.0,
                ),
            )
        except wandb.Error as error:
            raise UserError(
                "W&B did not start", got=error, fix="WANDB_MODE=offline, and wandb sync later"
            ) from None
        write_text(id_file, run_id + "\n")
        self._wandb = wandb
        self._run_dir = run_dir
        # The next step of the run as the server knows it; 0 offline.
        self.replay_from = self._run.step

    def log(
        self, row: Mapping[str, float], samples: Sequence[Mapping[str, Any]], total_steps: int
    ) -> None:
        """Log the row under its step, and the completions as a table with it."""
        values: dict[str, Any] = dict(row)
        if samples:
            values["samples"] = self._wandb.Table(
                columns=list(samples[0]), data=[list(sample.values()) for sample in samples]
            )
        with _data_dir(self._run_dir.path / "wandb" / "data"):
            self._run.log(values, step=int(row["step"]), commit=True)

    def finish(self, result: dict[str, Any], adapter: Path | None) -> None:
        """Put the result into the summary, and log the adapter as an artifact that refers to the
        run's own files.
        """
        self._run.summary["result"] = result
        if adapter is None:
            return
        artifact = self._wandb.Artifact(f"adapter-{self._run.id}", type="model", metadata=result)
        for file in sorted(path for path in adapter.rglob("*") if path.is_file()):
            artifact.add_file(
                str(file), name=str(file.relative_to(adapter)), policy="immutable", skip_cache=True
            )
        self._run.log_artifact(artifact)

    def close(self) -> None:
        """End the W&B run as finished, failed or interrupted, by the run's status."""
        status = self._run_dir.status
        self._run.summary["status"] = status.value
        self._run.finish(exit_code=_EXIT_CODES.get(status, 255))


def wandb_mode() -> WandBMode:
    """Return W&B's mode: WANDB_MODE, by default offline even where there is an API key.

    Raises UserError for an unknown mode.
    """
    mode = os.environ.get("WANDB_MODE") or "offline"
    modes: tuple[WandBMode, ...] = get_args(WandBMode)
    if mode not in modes:
        raise UserError("WANDB_MODE is unknown", got=mode, allowed=", ".join(modes))
    return mode


@contextlib.contextmanager
def _data_dir(folder: Path) -> Iterator[None]:
    """Make W&B copy tables into a folder, for `wandb sync` to find; its default is in the home
    directory.
    """
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
