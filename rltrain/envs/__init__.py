"""Environments: one module or package each, with its reward. A new one registers itself."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Protocol, cast

from harness.core.errors import UserError, nearest


class Env(Protocol):
    """What the trainer needs of an environment module.

    A module may also define

    - `prompt(question) -> list[dict[str, str]]`: the chat messages for a question; the default is
      one user message,

    - `can_score(ground_truth) -> bool`: whether any completion can score against this truth; the
      default is True,

    - `prepare(source, output_dir) -> dict[str, int]`: write the data files for `harness.prepare`
      and return the rows of each split. `source` None is the environment's own source.
    """

    def reward(self, completion: str, ground_truth: str) -> float:
        """Return the score of a completion. Must not raise for any completion."""


@functools.cache
def env_names() -> tuple[str, ...]:
    """Return the names of the built-in environments."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(
        name for name in names if offers(importlib.import_module(f"{__name__}.{name}"), "reward")
    )


@functools.cache
def get_env(env_class: str) -> Env:
    """Return the environment of a built-in name or of a dotted module path.

    Raises UserError when there is none.
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
    except (Exception, SystemExit) as error:  # a user's module can raise anything
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
