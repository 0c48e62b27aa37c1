"""Test the text of `--dry-run`, and the costs in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.records.files import write_json
from sweeps import cost as estimate
from sweeps import dry_run
from sweeps.study import plan as plans
from tests.unit.sweeps.curves import LR, RANK, recipe_of


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for name, rows in (("train", 20), ("val", 5)):
        pd.DataFrame({"prompt": range(rows)}).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "more.jsonl").write_text('{"prompt": 1}\n' * 4 + "\n")
    space = {RANK: {"choices": [1, 8]}, LR: {"low": 1e-5, "high": 1e-3, "log": True}}
    return recipes.with_values(
        recipe_of(space, num_trials=3, seeds=[0, 1], max_concurrent=2),
        {
            "data.train_data": [str(tmp_path / "train.parquet"), str(tmp_path / "more.jsonl")],
            "data.val_data": [str(tmp_path / "val.parquet")],
            "trainer.ckpt_path": str(tmp_path / "runs"),
            "trainer.max_steps": None,
            "trainer.epochs": 2,
            "trainer.train_batch_size": 8,
            "trainer.policy_mini_batch_size": 8,
            "trainer.eval_interval": 4,
            "generator.n_samples_per_prompt": 3,
            "generator.max_input_length": 10,
            "generator.sampling_params.max_generate_length": 20,
            "generator.eval_sampling_params.max_generate_length": 30,
        },
    )


def test_cost_of_a_run(recipe: Recipe) -> None:
    (cost,) = estimate.costs(plans.build(recipe))
    # 24 problems, 3 whole batches of 8, 2 epochs; evaluations at steps 0, 4 and 6.
    assert cost == estimate.Cost(6, 6 * 8 * 3, 3 * 5, 144 * 30 + 15 * 40, None)


def test_an_axis_that_changes_the_cost_gives_a_span(recipe: Recipe) -> None:
    space = {
        "generator.n_samples_per_prompt": {"choices": [2, 4]},
        "trainer.train_batch_size": {"choices": [8, 24]},
    }
    low, high = estimate.costs(plans.build(recipes.with_values(recipe, {"sweep.space": space})))
    assert (low.training_samples, high.training_samples) == (2 * 24 * 2, 6 * 8 * 4)


def test_the_cost_of_listed_configurations_is_theirs_and_not_the_corners(
    recipe: Recipe,
) -> None:
    steps, batch, update = (
        "trainer.max_steps",
        "trainer.train_batch_size",
        "trainer.policy_mini_batch_size",
    )
    first = [{steps: 12, batch: 4, update: 4}, {steps: 2, batch: 24, update: 24}]
    space = {steps: {"choices": [2, 12]}, batch: {"choices": [4, 24]}, update: {"choices": [4, 24]}}
    sweep = {"sweep.space": space, "sweep.first_trials": first, "sweep.num_trials": 2}
    few, many = estimate.costs(plans.build(recipes.with_values(recipe, sweep)))
    assert (few.steps, many.steps) == (2, 12)
    assert few.training_samples == many.training_samples == 48 * 3


def test_describe_a_sweep(recipe: Recipe) -> None:
    text = dry_run.describe(plans.build(recipe), "my.yaml")
    assert "3 configurations x 2 seeds = 6 runs, 2 at a time" in text
    assert f"{LR}" in text
    assert "1e-05 to 0.001" in text
    assert text.index("0-1") < text.index("2-3") < text.index("4-5")
    assert [line.split() for line in text.splitlines() if line.startswith("  steps")] == [
        ["steps", "6", "36"]
    ]
    assert "unknown until a first run" in text


def test_time_by_earlier_runs_of_the_same_recipe(recipe: Recipe) -> None:
    def ran(folder: str, source: str, seconds: float, status: str = "COMPLETE") -> None:
        result = {"seconds": seconds, "step": 6} if status == "COMPLETE" else None
        path = Path(recipe.trainer.ckpt_path) / folder / "manifest.json"
        write_json(path, {"status": status, "recipe": {"source": source}, "result": result})

    plan = plans.build(recipe)
    assert estimate.pace(plan, "my.yaml") is None
    ran("one", "recipes/my.yaml", 60)
    ran("sweep/trials/0000", "my.yaml", 600)
    ran("sweep/trials/0001", "my.yaml", 120)
    ran("sweep/trials/0002", "my.yaml", 0, status="FAILED")
    ran("other", "yours.yaml", 6000)
    (Path(recipe.trainer.ckpt_path) / "other" / "manifest.json").with_name("broken").mkdir()
    assert estimate.pace(plan, "my.yaml") == estimate.Pace(20.0, 3)
    # 6 runs of 2 minutes in two slots.
    assert "about 2 min 00 s  about 6 min 00 s (median of 3 earlier runs)" in dry_run.describe(
        plan, "my.yaml"
    )


def test_missing_data_is_named(recipe: Recipe) -> None:
    missing = recipes.with_values(recipe, {"data.train_data": ["nowhere/train.parquet"]})
    text = dry_run.describe(plans.build(missing), "my.yaml")
    assert "cost: unknown until the data is there" in text
    assert "nowhere/train.parquet" in text


def test_with_max_steps_the_cost_is_known_without_data(recipe: Recipe) -> None:
    nowhere = {
        "data.train_data": ["nowhere/train.parquet"],
        "data.val_data": ["nowhere/val.parquet"],
    }
    plan = plans.build(recipes.with_values(recipe, nowhere | {"trainer.max_steps": 6}))
    assert estimate.costs(plan) == [estimate.Cost(6, 6 * 8 * 3, None, 144 * 30, None)]
    text = dry_run.describe(plan, "my.yaml")
    assert "evaluation samples  not counted: no data yet" in text
    assert "nowhere/val.parquet" in text


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494),
        ("someone/Other-1B", 1),
        ("a/Mix-30B-A3B", 3),
        ("google/bert", None),
    ],
)
def test_a_hugging_face_model_has_its_published_size_or_the_one_in_its_name(
    recipe: Recipe, name: str, billions: float | None
) -> None:
    values = {"trainer.policy.model.path": name, "trainer.placement.device": "cuda", "sweep": None}
    cost = estimate.run_cost(recipes.with_values(recipe, values))
    assert cost is not None
    assert cost.flops == (
        None
        if billions is None
        else pytest.approx(billions * 1e9 * (6 * 144 * 30 + 2 * 15 * 40), rel=1e-3)
    )


def test_confirmation_runs_are_counted(recipe: Recipe) -> None:
    text = dry_run.describe(plans.build(recipe), "my.yaml", confirm=2)
    assert "the best 2 again, on seeds 2, 3: 4 more runs" in text
    assert "all 10" in text


def test_flops_on_a_gpu(recipe: Recipe, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    gpu = recipes.with_values(
        recipe, {"trainer.placement.device": "cuda", "trainer.policy.model.path": str(tmp_path)}
    )
    (cost,) = estimate.costs(plans.build(gpu))
    assert cost.flops == pytest.approx(494e6 * (6 * 144 * 30 + 2 * 15 * 40), rel=1e-2)
    assert "FLOPs" in dry_run.describe(plans.build(gpu), "my.yaml")
    # As wide as the dense model's MLP, eight times, of which a token passes two halves.
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 4864 // 2}
    (tmp_path / "config.json").write_text(json.dumps(config | mixture))
    (cost_of_mixture,) = estimate.costs(plans.build(gpu))
    assert cost_of_mixture.flops == cost.flops


def test_a_space_smaller_than_the_number_of_trials_is_noted(recipe: Recipe) -> None:
    small = recipes.with_values(recipe, {"sweep.space": {RANK: {"choices": [1, 8]}}})
    assert "the space has only 2 configurations" in dry_run.describe(plans.build(small), "my.yaml")
