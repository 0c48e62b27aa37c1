"""Environments: one module each, with its reward and what else it offers. A new file here registers
itself.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Protocol, cast

from harness.core.errors import UserError, nearest


class Env(Protocol):
    """What the trainer needs of an environment module.

    A module may also offer

    - `prompt(question) -> list[dict[str, str]]`: the chat messages for a question; without it, one
      user message,
    - `can_score(ground_truth) -> bool`: whether any completion can score against this truth;
      without it, all can,
    - `prepare(source, output_dir) -> dict[str, int]`: writes the data files for `harness.prepare`,
      and returns the rows of each split. `source` None: the environment's own source.
    """

    def reward(self, completion: str, ground_truth: str) -> float:
        """The score of a completion. Must not raise on any completion."""


@functools.cache
def env_names() -> tuple[str, ...]:
    """Names of the built-in environments."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        name for name in found if offers(importlib.import_module(f"{__name__}.{name}"), "reward")
    )


@functools.cache
def get_env(env_class: str) -> Env:
    """The environment of a built-in name or of a dotted module path; raises UserError when there is
    none.
    """
    if "." not in env_class:
        names = env_names()
        if env_class not in names:
            near = nearest(env_class, names)
            raise UserError(
                "unknown environment",
                got=f"env_class={env_class}",
                allowed=f"{', '.join(names)}, or the dotted path of your own module, as in "
                "my_package.my_env",
                fix=f"did you mean {near}?" if near else None,
            )
        return cast(Env, importlib.import_module(f"{__name__}.{env_class}"))
    try:
        module = importlib.import_module(env_class)
    except (
        Exception,
        SystemExit,
    ) as error:  # the user's own module may fail in any way while it is imported
        raise UserError(
            "cannot import the environment module",
            got=f"env_class={env_class}: {type(error).__name__}: {error}",
            fix="check the path, and run from the folder that holds the package or add it "
            "to PYTHONPATH",
        ) from error
    if not offers(module, "reward"):
        raise UserError(
            "the environment module has no reward",
            got=f"env_class={env_class}",
            allowed="a module with reward(completion, ground_truth)",
        )
    return cast(Env, module)


def offers(env: object, part: str) -> bool:
    """Return whether an environment has a function of this name."""
    return callable(getattr(env, part, None))
