"""Environments: one module each, with its prompt, reward and data preparation. A new file here registers itself."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from harness.errors import UserError, nearest


class Env(Protocol):
    """What an environment module offers."""

    def prepare(self, source: Sequence[Path] | None, output_dir: Path) -> dict[str, int]:
        """Write the environment's data files; returns rows per split. `source` None: the environment's own source."""

    def prompt(self, question: str) -> list[dict[str, str]]:
        """The chat messages for a question."""

    def reward(self, completion: str, ground_truth: str) -> float:
        """The score of a completion. Must not raise on any completion."""


_PARTS = ("prepare", "prompt", "reward")


@functools.cache
def env_names() -> tuple[str, ...]:
    """Names of the built-in environments."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(name for name in found if not _missing_parts(importlib.import_module(f"{__name__}.{name}")))


@functools.cache
def get_env(env_class: str) -> Env:
    """The environment of a built-in name or of a dotted module path; raises UserError when there is none."""
    if "." not in env_class:
        names = env_names()
        if env_class not in names:
            near = nearest(env_class, names)
            raise UserError(
                "unknown environment",
                got=f"environment.env_class={env_class}",
                allowed=f"{', '.join(names)}, or the dotted path of your own module, as in my_package.my_env",
                fix=f"did you mean {near}?" if near else None,
            )
        return cast(Env, importlib.import_module(f"{__name__}.{env_class}"))
    try:
        module = importlib.import_module(env_class)
    except Exception as error:  # the user's own module may fail in any way while it is imported
        raise UserError(
            "cannot import the environment module",
            got=f"environment.env_class={env_class}: {type(error).__name__}: {error}",
            fix="check the path, and run from the folder that holds the package or add it to PYTHONPATH",
        ) from error
    if missing := _missing_parts(module):
        raise UserError(
            "the environment module lacks what an environment offers",
            got=f"{env_class} has no {', '.join(missing)}",
            allowed="a module with prepare(source, output_dir), prompt(question) and reward(completion, ground_truth)",
        )
    return cast(Env, module)


def _missing_parts(module: object) -> list[str]:
    return [part for part in _PARTS if not callable(getattr(module, part, None))]
