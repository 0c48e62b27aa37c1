"""What a recipe expects: judged over seeds, by a mean with its interval."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from harness.config import recipe as recipes
from harness.config.digest import recipe_digest
from harness.config.expect import judge
from harness.core.errors import UserError
from tests.recipes import quickstart

ACCURACY = "eval/accuracy"
GAP = "sampling/sampling_logp_difference/mean"


def rows(*accuracies: float) -> list[dict[str, float]]:
    return [{"step": step, ACCURACY: value} for step, value in enumerate(accuracies)]


def test_the_mean_over_seeds_is_judged_not_the_best_seed() -> None:
    runs = [rows(0.3, 0.95), rows(0.3, 0.70), rows(0.3, 0.75)]
    verdict = judge({ACCURACY: {"min": 0.85}}, runs)[0]
    assert not verdict.met
    assert verdict.mean == pytest.approx(0.8)
    # t(0.975, 2) = 4.3027; the standard deviation of .95, .70, .75 is 0.132288: 0.8 -+ 4.3027 *
    # 0.132288 / sqrt(3).
    assert verdict.low == pytest.approx(0.47138, abs=1e-4)
    assert verdict.high == pytest.approx(1.12862, abs=1e-4)
    assert judge({ACCURACY: {"min": 0.75, "max": 0.9}}, runs)[0].met


def test_an_evaluation_counts_by_its_last_value_and_a_steps_metric_by_its_second_half() -> None:
    run = [{"step": step, GAP: gap} for step, gap in enumerate([0.0, 9.0, 9.0, 0.2, 0.4])] + [
        {"step": 5, ACCURACY: 0.5}
    ]
    verdicts = judge({ACCURACY: {"max": 0.5}, GAP: {"max": 0.3}}, [run])
    assert [verdict.mean for verdict in verdicts] == [0.5, pytest.approx(0.3)]
    assert str(verdicts[0]) == "met: eval/accuracy 0.5 (one seed), expected <= 0.5"
    # Step 0 is the base.
    assert math.isnan(judge({ACCURACY: {"min": 0.0}}, [rows(0.9)])[0].mean)


def test_a_metric_that_was_not_logged_is_not_met() -> None:
    verdict = judge({"kl": {"max": 1.0}}, [rows(0.3, 0.9), rows(0.3, 0.9)])[0]
    assert not verdict.met
    assert str(verdict).startswith("NOT MET: kl nan")


@pytest.mark.parametrize(
    ("expect", "told"),
    [
        ({"eval/acuracy": {"min": 0.5}}, "did you mean eval/accuracy?"),
        ({ACCURACY: 0.5}, "must give bounds"),
        ({ACCURACY: {}}, "must give bounds"),
        ({ACCURACY: {"least": 0.5}}, "must give bounds"),
        ({ACCURACY: {"min": "high"}}, "must be a number"),
        ({ACCURACY: {"min": float("nan")}}, "finite numbers"),
        ({ACCURACY: {"min": 0.9, "max": 0.5}}, "swap min and max"),
    ],
)
def test_bad_expectations_are_explained(expect: dict[str, Any], told: str) -> None:
    values = recipes.to_dict(quickstart()) | {"expect": expect}
    with pytest.raises(UserError) as caught:
        recipes.from_dict(values)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["quickstart", "quickstart_ppo", "gsm8k_lora", "gsm8k_ppo_lora"])
def test_shipped_recipes_expect_an_accuracy(name: str) -> None:
    assert "min" in recipes.load(name).expect[ACCURACY]


def test_expectations_do_not_make_another_experiment(tmp_path: Path) -> None:
    recipe = quickstart()
    digest = recipe_digest(recipe)
    recipe.expect = {}
    assert recipe_digest(recipe) == digest
