"""Repeat a run in a new directory, to compare both. Planning imports no torch, vllm or ray."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harness.config import recipe as recipes
from harness.config.digest import is_recipe_digest
from harness.config.schema import Recipe, TrainerConfig
from harness.core.errors import UserError
from harness.core.paths import shown
from harness.records import manifest
from harness.records.files import damage, write_text
from harness.records.metrics_file import MetricsFile
from harness.records.rerun import OWN_PLACE, name_of, record_of_run
from harness.records.run_dir import RunDir, Status

if TYPE_CHECKING:
    from rltrain.report import StepReport

# A killed run may have weights of an evaluation that it never logged.
_ENDED = (Status.COMPLETE.value, Status.PRUNED.value)


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A run and its planned repetition.

    `was` is the manifest of the run, `original`, and `last` its last logged step; `now` is the
    repetition's manifest.
    """

    original: RunDir
    was: dict[str, Any]
    last: int
    recipe: Recipe
    run_dir: RunDir
    now: dict[str, Any]

    @property
    def ended(self) -> bool:
        """Whether the original ended normally: its weights are then those it logged last."""
        return self.was.get("status") in _ENDED

    def agreement(self) -> manifest.Agreement:
        """Compare what the original was made from and with, with what is installed now."""
        return manifest.compare(self.was, self.now)


def plan(directory: str | Path, output: str | Path | None = None) -> Reproduction:
    """Plan a run's repetition, by default in runs/NAME-reproduced-TIME; write nothing.

    Raises UserError for a sweep, a run without a step, an output that exists, and what
    `recipes.read` raises.
    """
    original = RunDir(directory)
    was, rows = record_of_run(original), MetricsFile(original.metrics).rows()
    if not rows:
        raise UserError(
            "this run has logged no step: there is nothing to compare", got=shown(original.path)
        )
    name = f"{name_of(original)}-reproduced-{datetime.now():%Y%m%d-%H%M%S}"
    default = Path(TrainerConfig().ckpt_path) / name
    run_dir = RunDir(output or default)
    if run_dir.path.exists():
        raise _exists(run_dir)
    location = {
        "trainer.ckpt_path": str(run_dir.path.parent),
        "trainer.run_name": run_dir.path.name,
    }
    recipe = recipes.with_values(recipes.read(original.recipe), location)
    now = manifest.build(
        recipe,
        kind="run",
        name=run_dir.path.name,
        source=shown(original.recipe),
        overrides=OWN_PLACE,
        command=manifest.this_command(),
    )
    if isinstance(was.get("recipe"), dict) and is_recipe_digest(
        str(was["recipe"].get("digest")), recipe
    ):
        now["recipe"]["digest"] = was["recipe"]["digest"]
    return Reproduction(original, was, int(rows[-1]["step"]), recipe, run_dir, now)


def _exists(run_dir: RunDir) -> UserError:
    return UserError(
        "the output exists already",
        got=shown(run_dir.path),
        fix="name a folder that does not exist",
    )


def check(planned: Reproduction) -> None:
    """Raise UserError for what would fail the repetition: model, data, checkpoint, devices."""
    from rltrain.tools.fit import gpus_to_plan_for, note_fit
    from rltrain.tools.preflight import check_run

    check_run(planned.recipe)
    note_fit(planned.recipe, gpus_to_plan_for(planned.recipe, None))
    start = planned.recipe.trainer.resume_mode
    why = None if start in (None, "latest", "none") else damage(Path(str(start)))
    if why is not None:
        raise UserError(
            "the checkpoint that this run went on from cannot be used",
            got=f"trainer.resume_mode={start}: {why}",
            fix="put the folder back, or reproduce the run that wrote it first",
        )


def begin(planned: Reproduction) -> None:
    """Create the repetition's directory; raise UserError when it exists or cannot be written."""
    if planned.run_dir.manifest.exists():
        raise _exists(planned.run_dir)
    planned.run_dir.create(recipes.to_yaml(planned.recipe), planned.now)


def until_last_step(planned: Reproduction, training: Iterator[StepReport]) -> Generator[StepReport]:
    """Yield the reports of `training` up to the original's last step, then stop it."""
    with contextlib.closing(cast("Generator[StepReport]", training)) as reports:
        for report in reports:
            yield report
            if report.step >= planned.last:
                return


def conclude(planned: Reproduction, verdict: str, step: int) -> None:
    """Write the verdict to the repetition's manifest; a run stopped before its end is PRUNED."""
    run_dir = planned.run_dir
    if run_dir.status is Status.RUNNING:
        run_dir.move_to(
            Status.PRUNED, reason=f"compared with {shown(planned.original.path)} up to step {step}"
        )
    _record(planned, verdict)


def give_up(planned: Reproduction, verdict: str, error: Exception) -> None:
    """Record a failed repetition: its verdict and, in `log.txt`, the traceback.

    A full disk is ignored.
    """
    run_dir = planned.run_dir
    if run_dir.status is not Status.FAILED:
        run_dir.fail(error)
    with contextlib.suppress(OSError):
        _record(planned, verdict)
        write_text(run_dir.log, "".join(traceback.format_exception(error)))


def _record(planned: Reproduction, verdict: str) -> None:
    planned.run_dir.update(reproduces={"run": shown(planned.original.path), "verdict": verdict})
