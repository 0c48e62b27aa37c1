"""Test that the recipes of recipes/lora_without_regret compare what they say."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict

import pytest

from harness.config import recipe as recipes
from harness.config.advice import adapted_modules
from harness.config.schema import Recipe
from harness.config.shapes import shape_of
from sweeps.study import plan as plans
from sweeps.study.space import Params, identity

ALPHA, RANK = "trainer.policy.model.lora.alpha", "trainer.policy.model.lora.rank"
BATCH, LR, STEPS = (
    "trainer.policy_mini_batch_size",
    "trainer.policy.optimizer_config.lr",
    "trainer.max_steps",
)
TARGETS = "trainer.target_modules"
NAMES = ("lr_by_rank", "placement", "alpha", "batch_size")
BOTH = pytest.mark.parametrize("folder", ["lora_without_regret", "lora_without_regret/qwen"])


@functools.cache
def study(folder: str, name: str) -> tuple[Recipe, list[Params]]:
    """Return a recipe, and every configuration of its sweep."""
    recipe = recipes.load(f"recipes/{folder}/{name}.yaml")
    return recipe, plans.preview(plans.build(recipe), 1000)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_has_a_grid_of_learning_rates_on_three_seeds(folder: str, name: str) -> None:
    recipe, tried = study(folder, name)
    assert recipe.sweep is not None
    assert len(tried) == recipe.sweep.num_trials
    assert recipe.sweep.seeds == [0, 1, 2]
    arms: dict[str, list[float]] = defaultdict(list)
    for params in tried:
        arms[identity({key: value for key, value in params.items() if key != LR})].append(
            params[LR]
        )
    for rates in arms.values():
        assert len(rates) >= 6
        assert all(1.2 < high / low < 2.6 for low, high in itertools.pairwise(sorted(rates)))


@BOTH
def test_full_fine_tuning_is_an_arm(folder: str) -> None:
    assert {params[RANK] for params in study(folder, "lr_by_rank")[1]} == {0, 1, 4, 16, 64}
    assert {params[RANK] for params in study(folder, "batch_size")[1]} == {0, 1, 16}


@BOTH
def test_placement_compares_equal_parameters_and_equal_ranks(folder: str) -> None:
    recipe, tried = study(folder, "placement")
    shape = shape_of(recipe.trainer.policy.model.path)
    assert shape is not None
    ranks = {params[TARGETS]: params[RANK] for params in tried}
    trained = {
        name: shape.adapter_parameters(rank, adapted_modules(name, None))
        for name, rank in ranks.items()
    }
    assert trained["attention"] == pytest.approx(trained["mlp"], rel=0.03)
    assert ranks["all-linear"] == ranks["mlp"]


@BOTH
def test_alpha_is_fixed_in_one_series_and_twice_the_rank_in_the_other(folder: str) -> None:
    pairs = {(params[RANK], params[ALPHA]) for params in study(folder, "alpha")[1]}
    assert pairs == {(r, 32.0) for r in (4, 16, 64)} | {(r, 2.0 * r) for r in (4, 16, 64)}


@BOTH
def test_batches_see_the_same_number_of_episodes(folder: str) -> None:
    _, tried = study(folder, "batch_size")
    batches = {
        (params["trainer.train_batch_size"], params[BATCH], params[STEPS]) for params in tried
    }
    assert len(batches) == 2
    assert len({batch * steps for batch, _, steps in batches}) == 1
    assert all(batch == update for batch, update, _ in batches)


@pytest.mark.parametrize("name", NAMES)
def test_qwen_gets_the_same_comparisons(name: str) -> None:
    (ours, _), (theirs, _) = (
        study(folder, name) for folder in ("lora_without_regret", "lora_without_regret/qwen")
    )
    assert ours.sweep is not None
    assert theirs.sweep is not None
    spaces = [plans.build(recipe).space for recipe in (ours, theirs)]
    assert [axis.key for axis in spaces[0].axes] == [axis.key for axis in spaces[1].axes]
    assert theirs.trainer.policy.model.path == "Qwen/Qwen2.5-0.5B-Instruct"
