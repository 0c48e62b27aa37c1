"""New runs with the recipe of an earlier run, in directories of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from harness.config import recipe as recipes
from harness.config.schema import TrainerConfig
from harness.core.errors import UserError
from harness.core.paths import shown
from harness.records.run_dir import RunDir

# Overrides that keep a new run out of the earlier run's directory.
OWN_PLACE = ("trainer.run_name=null", f"trainer.ckpt_path={TrainerConfig().ckpt_path}")
_TIME = re.compile(r"-\d{8}-\d{6}$")


def new_run_from(directory: str | Path) -> tuple[str, list[str], str]:
    """Return a run's recipe file, overrides for a new run, and the start of the new run's name.

    Raises UserError for a directory that is no run's or has no readable recipe.
    """
    run_dir = RunDir(directory)
    run_dir.sound_manifest()
    recipes.read(run_dir.recipe)
    fresh = [*OWN_PLACE, f"trainer.resume_mode={TrainerConfig().resume_mode}"]
    return shown(run_dir.recipe), fresh, _TIME.sub("", name_of(run_dir))


def name_of(run_dir: RunDir) -> str:
    """Return a run's name; a trial's begins with its sweep's name."""
    path = run_dir.path
    return f"{path.parent.parent.name}-{path.name}" if path.parent.name == "trials" else path.name


def record_of_run(run_dir: RunDir) -> dict[str, Any]:
    """Return the manifest of a run or trial.

    Raises UserError for a damaged manifest, and for a sweep, naming one of its trials.
    """
    record = run_dir.sound_manifest()
    if record["kind"] != "sweep":
        return record
    trials = sorted(shown(file.parent) for file in run_dir.trials.glob("*/manifest.json"))
    raise UserError(
        "this directory holds a sweep",
        got=shown(run_dir.path),
        allowed="a run, or one of its trials",
        fix=f"name a trial: {trials[0]}" if trials else "it has no trials yet",
    )
