"""Model FLOPs of a step, by the passes that a recipe needs."""

from __future__ import annotations

from typing import Any

import pytest

from harness.config import recipe as recipes
from harness.config.shapes import flops_per_token, needs_old_logprobs, training_flops
from tests.recipes import quickstart

RANK, CRITIC_RANK = "trainer.policy.model.lora.rank", "trainer.critic.model.lora.rank"
BATCH = {"trainer.train_batch_size": 8, "trainer.policy_mini_batch_size": 8}


def test_full_fine_tuning_takes_six_a_parameter_and_lora_four() -> None:
    assert training_flops(10, forwards=0, updates=1, full=True) == 60
    assert training_flops(10, forwards=0, updates=1, full=False) == 40
    assert training_flops(10, forwards=3, updates=2, full=False) == 140


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 2 + 4),
        ({RANK: 0}, 2 + 6),
        ({"trainer.policy_mini_batch_size": 4}, 2 + 2 + 4),
        ({"trainer.update_epochs_per_batch": 3}, 2 + 2 + 3 * 4),
        ({"trainer.algorithm.use_kl_loss": True}, 2 + 2 + 4),
        ({"trainer.algorithm.use_kl_in_reward": True}, 2 + 2 + 2 + 4),
        ({"trainer.algorithm.advantage_estimator": "gae", CRITIC_RANK: 8}, 2 + 4 + 2 + 4),
        ({"trainer.algorithm.advantage_estimator": "gae", CRITIC_RANK: 0}, 2 + 4 + 2 + 6),
    ],
)
def test_passes_follow_the_recipe(values: dict[str, Any], expected: int) -> None:
    base: dict[str, Any] = BATCH | {
        RANK: 8,
        "trainer.algorithm.use_kl_loss": False,
        "trainer.algorithm.use_kl_in_reward": False,
    }
    recipe = recipes.with_values(quickstart(["sweep=null"]), base | values)
    assert flops_per_token(recipe, 1.0) == expected


def test_dropout_needs_old_log_probabilities() -> None:
    recipe = recipes.with_values(quickstart(["sweep=null"]), BATCH)
    assert not needs_old_logprobs(recipe)
    assert needs_old_logprobs(
        recipes.with_values(recipe, {"trainer.policy.model.lora.dropout": 0.1})
    )
