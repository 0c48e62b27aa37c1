"""Test `sweep.space`: what is valid, its errors, and how Optuna stores its values."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from harness.config import recipe as recipes
from harness.core.errors import UserError
from sweeps.study import space as spaces
from sweeps.study.space import Space, encode, from_recipe, short_names
from tests.unit.sweeps.curves import ALPHA, LR, RANK, TARGETS, recipe_of

BATCH, MINI = "trainer.train_batch_size", "trainer.policy_mini_batch_size"


def space_of(space: dict[str, Any]) -> Space:
    return from_recipe(recipe_of(space))


def test_each_form_becomes_its_distribution() -> None:
    space = space_of(
        {
            RANK: {"choices": [1, 8]},
            LR: {"low": 1e-5, "high": 1e-3, "log": True},
            ALPHA: {"low": 8, "high": 64, "step": 8},
            BATCH: {"low": 128, "high": 512, "step": 128},
        }
    )
    assert space.distributions == {
        RANK: CategoricalDistribution([1, 8]),
        LR: FloatDistribution(1e-5, 1e-3, log=True),
        # The key is a float, so the axis is too, although its bounds are written as integers.
        ALPHA: FloatDistribution(8.0, 64.0, step=8.0),
        BATCH: IntDistribution(128, 512, step=128),
    }
    assert [axis.kind for axis in space.axes] == ["choices", "float, log", "float", "int"]
    assert space.size is None
    assert (
        space_of({RANK: {"choices": [1, 8]}, BATCH: {"low": 128, "high": 512, "step": 128}}).size
        == 8
    )


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"trainer.policy.model.lora.rnak": {"choices": [1]}},
            "did you mean trainer.policy.model.lora.rank?",
        ),
        ({"sweep.num_trials": {"choices": [1]}}, "does not sweep itself"),
        ({"seed": {"choices": [1, 2]}}, "sweep.seeds"),
        ({"trainer.run_name": {"choices": ["a", "b"]}}, "names its trials' directories itself"),
        ({"trainer.policy": {"choices": [1]}}, "a group of keys"),
        ({RANK: {"choices": [1, 2], "low": 1, "high": 4}}, "both choices and a range"),
        ({RANK: {"choices": None}}, "neither choices nor a range"),
        ({RANK: {"choices": []}}, "has no choices"),
        ({RANK: {"choices": 8}}, "has no choices"),
        ({RANK: {"choice": [8]}}, "unknown field"),
        ({RANK: [1, 2]}, "no axis"),
        ({RANK: {"choices": [8, 8]}}, "the same choice twice"),
        ({ALPHA: {"choices": [16, 16.0]}}, "the same choice twice"),
        ({RANK: {"choices": [8, 513]}}, "cannot be 513"),
        ({RANK: {"choices": [8, "many"]}}, "cannot be many"),
        ({RANK: {"low": 1, "high": 1000}}, "cannot be 1000"),
        ({RANK: {"low": 1.5, "high": 8}}, "cannot be 1.5"),
        ({RANK: {"low": 8, "high": 8}}, "low must be below high"),
        ({RANK: {"low": 9, "high": 8}}, "low must be below high"),
        ({RANK: {"low": 8}}, "needs a number for high"),
        ({LR: {"low": "1e-5", "high": 1e-3}}, "needs a number for low"),
        ({LR: {"low": 0, "high": 1e-3, "log": True}}, "starts above 0"),
        ({LR: {"low": 1e-5, "high": 1e-3, "log": "yes"}}, "log is true or false"),
        ({LR: {"low": 1e-5, "high": 1e-3, "log": True, "step": 1e-5}}, "has no step"),
        ({ALPHA: {"low": 1, "high": 10, "step": 4}}, "whole steps"),
        ({ALPHA: {"low": 1, "high": 10, "step": 0}}, "whole steps"),
        ({TARGETS: {"low": 1, "high": 2}}, "cannot be 1"),
        ({"trainer.policy.model.lora.sync": {"choices": ["disk", "cloud"]}}, "cannot be cloud"),
        ({}, "sweeps nothing"),
    ],
)
def test_errors(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        space_of(space)
    assert message in str(caught.value)


def test_lists_as_choices_are_text_in_optuna() -> None:
    modules = ["q_proj", "v_proj"]
    space = space_of({TARGETS: {"choices": ["all-linear", modules]}})
    (axis,) = space.axes
    assert isinstance(axis.distribution, CategoricalDistribution)
    assert axis.distribution.choices == ("all-linear", '["q_proj", "v_proj"]')
    assert space.decode_all({TARGETS: encode(modules)}) == {TARGETS: modules}


def test_choices_have_the_type_of_the_key() -> None:
    axis = space_of({ALPHA: {"choices": [16, 32]}}).axes[0]
    assert [type(choice) for choice in axis.choices or ()] == [float, float]
    assert axis.contains(16)
    assert not axis.contains(17)
    assert isinstance(axis.convert(16), float)


def test_overrides_arrive_nested_and_win() -> None:
    nested = {
        "trainer": {"policy": {"optimizer_config": {"lr": {"high": 5e-2}}}, "target_modules": None}
    }
    space = space_of(
        {
            LR: {"low": 1e-5, "high": 1e-3, "log": True},
            TARGETS: {"choices": ["attention", "mlp"]},
            **nested,
        }
    )
    assert space.distributions == {LR: FloatDistribution(1e-5, 5e-2, log=True)}


def test_an_override_on_the_command_line_reaches_its_axis() -> None:
    recipe = recipes.load(
        "quickstart", [f"sweep.space.{RANK}.choices=[1,64]", f"sweep.space.{TARGETS}=null"]
    )
    space = from_recipe(recipe)
    assert space[RANK].choices == (1, 64)
    assert TARGETS not in space.distributions


def test_keys_that_depend_on_each_other_are_checked_together() -> None:
    # A mini-batch must divide its batch: 96 is wrong for the base's batch of 128, and right for
    # 192.
    space = space_of({BATCH: {"choices": [128, 192]}, MINI: {"choices": [64, 96]}})
    assert space[MINI].choices == (64, 96)
    with pytest.raises(UserError, match="cannot be 100"):
        space_of({BATCH: {"choices": [128, 192]}, MINI: {"choices": [64, 100]}})


def test_the_hash_follows_the_space() -> None:
    space = {RANK: {"choices": [1, 8]}, LR: {"low": 1e-5, "high": 1e-3, "log": True}}
    reordered = dict(reversed(space.items()))
    assert space_of(space).hash == space_of(reordered).hash
    assert space_of(space).hash != space_of(space | {RANK: {"choices": [1, 8, 16]}}).hash
    # Equal in the text for users.
    assert (
        space_of(space).hash
        != space_of(space | {LR: {"low": 1e-5, "high": 1.00001e-3, "log": True}}).hash
    )


def test_every_point_of_a_finite_space_is_reached_once() -> None:
    space = space_of(
        {
            RANK: {"choices": [1, 8]},
            ALPHA: {"low": 8, "high": 32, "step": 8},
            BATCH: {"choices": [128]},
        }
    )
    assert space.size == 8
    points = [space.point(index) for index in range(8)]
    assert points[:2] == [{RANK: 1, ALPHA: 8.0, BATCH: 128}, {RANK: 1, ALPHA: 16.0, BATCH: 128}]
    assert len({spaces.identity(point) for point in points}) == 8


def test_short_names_stay_apart() -> None:
    assert short_names([RANK, LR]) == {RANK: "rank", LR: "lr"}
    both = ["generator.sampling_params.temperature", "generator.eval_sampling_params.temperature"]
    assert list(short_names(both).values()) == [
        "sampling_params.temperature",
        "eval_sampling_params.temperature",
    ]
