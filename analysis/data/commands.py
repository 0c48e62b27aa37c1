"""The command that runs a trial again by itself."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from analysis.data.records import Record
from harness.config import recipe as recipes
from harness.config.schema import Trainer
from harness.core.errors import UserError
from harness.core.paths import shown

if TYPE_CHECKING:
    from analysis.experiment import Experiment


def command(experiment: Experiment, run_dir: str) -> str:
    """The command that runs a run or trial again, as its row of the tables has it."""
    runs = experiment.tables.runs
    return str(runs.loc[runs["run_dir"] == run_dir, "command"].iloc[0])


class Commands:
    """`python -m harness.run ...` for the runs of a directory, quoted for a shell: each composes to
    that very recipe.

    That is the recipe file with the overrides the manifest records; where they no longer give the
    same recipe (the file has changed or gone), the run's own saved recipe is named instead.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # By recipe file and keys overridden: a recipe that was composed in full, and the run's own
        # that it equals.
        self._composed: dict[tuple[str, frozenset[str]], dict[str, Any] | None] = {}

    def command(self, record: Record) -> str:
        """The command of one run."""
        written = record.manifest.get("recipe") or {}
        source, overrides = (
            str(written.get("source")),
            [str(override) for override in written.get("overrides") or []],
        )
        # A recipe file inside the directory is none that a person keeps: it came with what is
        # reported.
        own = Path(os.path.abspath(source)).is_relative_to(self._directory.resolve())
        if own or not self._gives(source, overrides, record.recipe):
            source = shown((self._directory / record.run_dir / "recipe.yaml").resolve())
            # Not into the directory of the run that is to be repeated.
            overrides = ["trainer.run_name=null", f"trainer.ckpt_path={Trainer().ckpt_path}"]
        return shlex.join(["python", "-m", "harness.run", source, *overrides])

    def _gives(self, source: str, overrides: Sequence[str], resolved: dict[str, Any]) -> bool:
        """Whether a recipe file with these overrides is the very experiment a resolved recipe
        describes.

        Composing takes a tenth of a second: of runs that override the same keys only the first is
        composed, where the others differ from it in these keys alone, as their overrides say.
        """
        keys = (source, frozenset(override.partition("=")[0] for override in overrides))
        if keys not in self._composed:
            self._composed[keys] = resolved if _composes(source, overrides, resolved) else None
        first = self._composed[keys]
        if first is None or first is resolved:
            return first is not None
        expected = copy.deepcopy(first)
        as_said = all(_set(expected, override) for override in overrides) and _content(
            expected
        ) == _content(resolved)
        return as_said or _composes(source, overrides, resolved)


def _composes(source: str, overrides: Sequence[str], resolved: dict[str, Any]) -> bool:
    try:
        found, wanted = recipes.load(source, overrides), recipes.from_dict(resolved)
    except UserError:
        return False
    found.sweep = wanted.sweep = None
    return recipes.digest(found) == recipes.digest(wanted)


def _set(values: dict[str, Any], override: str) -> bool:
    """Set an override's key in a resolved recipe; False where it has no such key or the override
    cannot be read.
    """
    *groups, leaf = override.partition("=")[0].split(".")
    group: Any = values
    for name in groups:
        group = group.get(name) if isinstance(group, dict) else None
    if not isinstance(group, dict) or leaf not in group:
        return False
    try:
        group[leaf] = _value(override)
    except HydraException:
        return False
    return True


@cache
def _value(override: str) -> Any:
    return OverridesParser.create().parse_override(override).value()


def _content(resolved: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's digest is of: all but its sweep, its name and place, and where and how well
    it is to run.
    """
    trainer = resolved.get("trainer")
    if not isinstance(trainer, dict):
        return {}
    own = {
        name: value
        for name, value in trainer.items()
        if name not in ("run_name", "ckpt_path", "resume_mode")
    }
    rest = {
        name: value
        for name, value in resolved.items()
        if name not in ("sweep", "ray", "expect", "trainer")
    }
    return {**rest, "trainer": own}
