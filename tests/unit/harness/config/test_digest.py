"""Digests of recipes, and the keys that make no other experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import recipe as recipes
from harness.config.digest import exempt_from, is_recipe_digest, older_digest, recipe_digest
from harness.config.recipe_keys import flatten, known_keys

# As run directories have them: a new key must not change them at its default.
RECORDED = "dda1e0bcbe99fa39fd004999b8f4ac84ece498c8bd9a60e336d4c7cbc4e48307"
OLDER = "a08cd3cac8f89f9c9f0389160b15f1ba10aec8b575618087982dd5c0ca023ed9"


def test_recorded_digests_stay_valid() -> None:
    recipe = recipes.from_dict({"trainer": {"policy": {"model": {"path": "x"}}}})
    assert (recipe_digest(recipe), older_digest(recipe)) == (RECORDED, OLDER)
    assert is_recipe_digest(OLDER, recipe)
    assert not is_recipe_digest(OLDER, recipes.with_values(recipe, {"seed": 1}))


@pytest.mark.parametrize("rule", ["digest", "run", "sweep", "expectations"])
def test_every_exempt_key_or_prefix_is_one_of_the_recipe(rule: str) -> None:
    for exempt in exempt_from(rule):  # type: ignore[arg-type]
        assert any(key.startswith(exempt) for key in known_keys())


@pytest.mark.parametrize(
    "override",
    [
        "trainer.run_name=other",
        "trainer.ckpt_path=elsewhere",
        "trainer.resume_mode=none",
        "trainer.max_tokens_per_microbatch=77",
        "ray.address=auto",
        "expect={reward: {min: 0}}",
    ],
)
def test_exempt_keys_keep_the_digest(override: str) -> None:
    plain = recipes.load("quickstart")
    assert recipe_digest(recipes.load("quickstart", [override])) == recipe_digest(plain)


def test_nested_values_are_flattened_to_dotted_keys() -> None:
    nested = {"a": 1, "b": {"c": [2], "d": {"e": None}, "f": {}}}
    assert dict(flatten(nested)) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_yaml_round_trip_keeps_the_digest(tmp_path: Path) -> None:
    recipe = recipes.load("quickstart", ["trainer.policy.model.lora.rank=3"])
    (tmp_path / "recipe.yaml").write_text(recipes.to_yaml(recipe))
    assert recipe_digest(recipes.read(tmp_path / "recipe.yaml")) == recipe_digest(recipe)
    assert recipe_digest(recipes.load("quickstart")) != recipe_digest(recipe)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "data.val_data=[other.parquet]",
        "environment.env_class=math",
        "generator.sampling_params.temperature=0.5",
        "trainer.algorithm.kl_loss_coef=0.5",
        "sweep.seeds=[7]",
    ],
)
def test_the_digest_covers_every_part_of_the_experiment(override: str) -> None:
    plain = recipes.load("quickstart")
    assert recipe_digest(recipes.load("quickstart", [override])) != recipe_digest(plain)
