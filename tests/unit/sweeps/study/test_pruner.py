"""Test `sweep.pruner`: names and arguments."""

from __future__ import annotations

from typing import Any

import pytest
from optuna import pruners

from harness.core.errors import UserError
from sweeps.study.pruner import PRUNERS, build_pruner
from tests.unit.sweeps.curves import recipe_of


def test_every_pruner_of_optuna_has_a_name() -> None:
    assert set(PRUNERS.values()) == {
        getattr(pruners, name) for name in pruners.__all__ if name != "BasePruner"
    }
    assert PRUNERS["successive_halving"] is pruners.SuccessiveHalvingPruner


def test_null_prunes_nothing() -> None:
    assert isinstance(build_pruner(recipe_of(pruner=None)), pruners.NopPruner)


def test_rungs_follow_the_recipe_by_default() -> None:
    recipe = recipe_of(steps=50, pruner={"name": "hyperband"})
    recipe.trainer.eval_interval = 10
    built = build_pruner(recipe)
    assert (built._min_resource, built._max_resource) == (10, 50)  # type: ignore[attr-defined]
    recipe = recipe_of(
        steps=50, pruner={"name": "hyperband", "min_resource": 5, "reduction_factor": 2}
    )
    built = build_pruner(recipe)
    assert (built._min_resource, built._reduction_factor) == (5, 2)  # type: ignore[attr-defined]


def test_pruners_nest() -> None:
    built = build_pruner(
        recipe_of(pruner={"name": "patient", "wrapped_pruner": {"name": "median"}, "patience": 2})
    )
    assert isinstance(built._wrapped_pruner, pruners.MedianPruner)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        ({"name": "hyperbands"}, "did you mean hyperband?"),
        ({"min_resource": 3}, "is no pruner"),
        ({"name": "median", "n_startup_trial": 3}, "did you mean n_startup_trials?"),
        ({"name": "percentile", "percentile": 120}, "refuses this"),
        ({"name": "percentile"}, "refuses this"),
        (
            {"name": "patient", "wrapped_pruner": {"name": "medium"}, "patience": 1},
            "did you mean median?",
        ),
    ],
)
def test_errors(pruner: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_pruner(recipe_of(pruner=pruner))
    assert message in str(caught.value)
