"""The command that runs a trial again by itself."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.experiment import Experiment
from analysis.records import read_recipe, read_record
from harness import recipe as recipes
from harness.errors import UserError
from harness.paths import shown
from harness.rundir import RunDir
from harness.schema import Trainer


def command(experiment: Experiment, run_dir: str) -> str:
    """`python -m harness.run ...` for a run or trial, quoted for a shell: it composes to that very recipe.

    That is the recipe file with the overrides the manifest records; where they no longer give the same recipe (the file
    has changed or gone), the run's own saved recipe is named instead.
    """
    path = experiment.path / run_dir
    written = read_record(RunDir(path), run_dir).manifest.get("recipe") or {}
    source, overrides = str(written.get("source")), [str(override) for override in written.get("overrides") or []]
    # A recipe file inside the directory is none that a person keeps: it came with what is reported.
    own = Path(os.path.abspath(source)).is_relative_to(experiment.path.resolve())
    if own or not _gives(source, overrides, read_recipe(path)):
        saved = (path / "recipe.yaml").resolve()
        source = shown(saved)
        # Not into the directory of the run that is to be repeated.
        overrides = ["trainer.run_name=null", f"trainer.ckpt_path={Trainer().ckpt_path}"]
    return shlex.join(["python", "-m", "harness.run", source, *overrides])


def _gives(source: str, overrides: Sequence[str], resolved: dict[str, Any]) -> bool:
    """Whether a recipe file with these overrides is the very experiment a resolved recipe describes."""
    try:
        found, wanted = recipes.load(source, overrides), recipes.from_dict(resolved)
    except UserError:
        return False
    found.sweep = wanted.sweep = None
    return recipes.digest(found) == recipes.digest(wanted)
