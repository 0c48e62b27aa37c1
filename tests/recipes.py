"""The quickstart recipe for tests, composed once in a process.

Hydra needs a tenth of a second.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

from harness.config import recipe as recipes
from harness.config.schema import Recipe


def quickstart(overrides: Sequence[str] = ()) -> Recipe:
    """Return a copy of `recipes/quickstart.yaml` with overrides."""
    return copy.deepcopy(_quickstart(tuple(overrides)))


@functools.cache
def _quickstart(overrides: tuple[str, ...]) -> Recipe:
    return (
        recipes.with_overrides(_quickstart(()), overrides)
        if overrides
        else recipes.load("quickstart")
    )
