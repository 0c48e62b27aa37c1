"""Find the command that repeats a run."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from analysis.data.records import Record
from harness.config import recipe as recipes
from harness.config.digest import exempt_from, recipe_digest
from harness.config.recipe_keys import flatten
from harness.core.errors import UserError
from harness.core.paths import shown
from harness.records.rerun import OWN_PLACE


class Commands:
    """`python -m harness.run ...` for the runs of a directory, quoted for a shell.

    A command names the recipe file and the overrides that the manifest records. Where these no
    longer give the run's recipe (the file changed or is gone), it names the run's saved recipe.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # By recipe file and overridden keys: the resolved recipe of the first run that the file
        # reproduces; None where it does not.
        self._composed: dict[tuple[str, frozenset[str]], dict[str, Any] | None] = {}

    def command(self, record: Record) -> str:
        """Return the command of one run."""
        written = record.manifest.get("recipe") or {}
        source = str(written.get("source"))
        overrides = [str(override) for override in written.get("overrides") or []]
        # A recipe file inside the directory came with it: no user keeps it as a recipe.
        inside = Path(os.path.abspath(source)).is_relative_to(self._directory.resolve())
        if inside or not self._reproduces(source, overrides, record.recipe):
            source = shown((self._directory / record.run_dir / "recipe.yaml").resolve())
            # The repeated run needs a directory of its own.
            overrides = list(OWN_PLACE)
        return shlex.join(["python", "-m", "harness.run", source, *overrides])

    def _reproduces(self, source: str, overrides: Sequence[str], resolved: dict[str, Any]) -> bool:
        """Return whether a recipe file with these overrides gives a resolved recipe.

        Composing takes a tenth of a second. Of runs that override the same keys only the first is
        composed; the others are compared with it, these keys aside.
        """
        keys = (source, frozenset(override.partition("=")[0] for override in overrides))
        if keys not in self._composed:
            self._composed[keys] = resolved if _composes(source, overrides, resolved) else None
        first = self._composed[keys]
        if first is None or first is resolved:
            return first is not None
        expected = copy.deepcopy(first)
        known = all(_set(expected, override) for override in overrides)
        return (known and _digested(expected) == _digested(resolved)) or _composes(
            source, overrides, resolved
        )


def _composes(source: str, overrides: Sequence[str], resolved: dict[str, Any]) -> bool:
    try:
        composed, expected = recipes.load(source, overrides), recipes.from_dict(resolved)
    except UserError:
        return False
    composed.sweep = expected.sweep = None
    return recipe_digest(composed) == recipe_digest(expected)


def _set(values: dict[str, Any], override: str) -> bool:
    """Set an override's key in a resolved recipe; return whether it has the key and can be read."""
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


def _digested(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a recipe that its digest covers."""
    exempt = (*exempt_from("digest"), "sweep", "ray")
    return {key: value for key, value in flatten(resolved) if not key.startswith(exempt)}
