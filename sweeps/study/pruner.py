"""The pruner of a sweep: any of Optuna's, by name, and the trials that it compares."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Container, Mapping
from typing import Any

import optuna
from optuna import pruners
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.trial import FrozenTrial, TrialState

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


class PrunerView(optuna.Study):
    """A study as its pruner sees it: without confirmation runs.

    Attributes:
        excluded: further trials that the pruner does not see.
        still_running: trials that the pruner sees as running although they may have ended.
    """

    excluded: frozenset[int] = frozenset()
    still_running: frozenset[int] = frozenset()

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials in these states, or all."""
        excluded = self.excluded
        if states is not None and TrialState.RUNNING not in states:
            excluded = excluded | self.still_running
        return [
            trial
            for trial in super().get_trials(deepcopy, states)
            if not trial.user_attrs.get("confirm") and trial.number not in excluded
        ]


def build_pruner(recipe: Recipe) -> BasePruner:
    """Return the pruner of a recipe's sweep; one that prunes nothing where it has none.

    Raises UserError for an unknown name or argument.
    """
    settings = recipe.sweep.pruner if recipe.sweep else None
    return NopPruner() if settings is None else _build(settings, recipe, "sweep.pruner")


def _build(settings: Mapping[str, Any], recipe: Recipe, where: str) -> BasePruner:
    name = settings.get("name")
    if name not in PRUNERS:
        guess = nearest(str(name), PRUNERS)
        raise UserError(
            f"{where}.name is no pruner",
            got=name,
            allowed=", ".join(PRUNERS),
            fix=f"did you mean {guess}?" if guess else None,
        )
    pruner = PRUNERS[name]
    known = [p for p in inspect.signature(pruner).parameters if p != "self"]
    arguments = {**_defaults(name, recipe), **{k: v for k, v in settings.items() if k != "name"}}
    for argument, value in arguments.items():
        if argument not in known:
            guess = nearest(argument, known)
            fix = (
                f"did you mean {guess}?"
                if guess
                else "overrides add to the recipe's pruner: sweep.pruner=null first"
            )
            raise UserError(
                f"{where}: {pruner.__name__} takes no such argument",
                got=argument,
                allowed=", ".join(known),
                fix=fix,
            )
        if isinstance(value, Mapping):
            arguments[argument] = _build(value, recipe, f"{where}.{argument}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return pruner(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {pruner.__name__} refuses this", got=dict(settings), fix=str(error)
        ) from None


def _defaults(name: str, recipe: Recipe) -> dict[str, Any]:
    """Return rungs from the first evaluation to the last step, where the recipe sets these.

    Optuna's defaults start at step 1, and end at the length of the first finished trial, which may
    be another trial after a resumption.
    """
    trainer = recipe.trainer
    defaults: dict[str, Any] = {}
    if name in ("hyperband", "successive_halving") and trainer.eval_interval > 0:
        defaults["min_resource"] = trainer.eval_interval
    if name == "hyperband" and trainer.max_steps is not None:
        defaults["max_resource"] = trainer.max_steps
    return defaults
