"""A recipe's `sweep.pruner` as an Optuna pruner: any of Optuna's, by name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from optuna import pruners
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner

from harness.config.schema import Recipe
from harness.core.errors import UserError, nearest

PRUNERS: dict[str, type[BasePruner]] = {
    # HyperbandPruner is `hyperband`, SuccessiveHalvingPruner is `successive_halving`.
    "".join(f"_{c.lower()}" if c.isupper() else c for c in name.removesuffix("Pruner")).strip(
        "_"
    ): getattr(pruners, name)
    for name in pruners.__all__
    if name != "BasePruner"
}


def build_pruner(recipe: Recipe) -> BasePruner:
    """The pruner of a recipe's sweep, none for null; raises UserError for an unknown name or
    argument.
    """
    given = recipe.sweep.pruner if recipe.sweep else None
    return NopPruner() if given is None else _build(given, recipe, "sweep.pruner")


def _build(given: Mapping[str, Any], recipe: Recipe, where: str) -> BasePruner:
    name = given.get("name")
    if name not in PRUNERS:
        guess = nearest(str(name), PRUNERS)
        raise UserError(
            f"{where}.name is no pruner",
            got=name,
            allowed=", ".join(PRUNERS),
            fix=f"did you mean {guess}?" if guess else None,
        )
    kind = PRUNERS[name]
    known = [p for p in inspect.signature(kind).parameters if p != "self"]
    arguments = {**_defaults(name, recipe), **{k: v for k, v in given.items() if k != "name"}}
    for argument, value in arguments.items():
        if argument not in known:
            guess = nearest(argument, known)
            fix = (
                f"did you mean {guess}?"
                if guess
                else "overrides add to the recipe's pruner: sweep.pruner=null first"
            )
            raise UserError(
                f"{where}: {kind.__name__} takes no such argument",
                got=argument,
                allowed=", ".join(known),
                fix=fix,
            )
        if isinstance(value, Mapping):
            arguments[argument] = _build(value, recipe, f"{where}.{argument}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {kind.__name__} refuses this", got=dict(given), fix=str(error)
        ) from None


def _defaults(name: str, recipe: Recipe) -> dict[str, Any]:
    """Rungs in optimizer steps: from the first evaluation to the last step, where the recipe sets
    these.

    Optuna's own start at step 1 and end at the first finished trial's length, which a resumed sweep
    may see otherwise.
    """
    trainer = recipe.trainer
    defaults: dict[str, Any] = {}
    if name in ("hyperband", "successive_halving") and trainer.eval_interval > 0:
        defaults["min_resource"] = trainer.eval_interval
    if name == "hyperband" and trainer.max_steps is not None:
        defaults["max_resource"] = trainer.max_steps
    return defaults
