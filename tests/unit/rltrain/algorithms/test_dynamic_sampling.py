"""Dynamic sampling on rewards by hand: what is trained on, and how often is sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.config.schema import Recipe
from rltrain.algorithms.dynamic_sampling import needs_another_batch, select_groups
from rltrain.data.files import Example
from rltrain.engines.base import Sample
from rltrain.envs import get_env
from rltrain.envs.problems import Problem
from rltrain.rollout import Rollout
from tests.recipes import quickstart

GOOD, BAD, SOLVED = [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]
NO_MEMBER: Any = None


def _rollout(*rewards: list[float], first: int = 0, reason: str = "stop") -> Rollout:
    """Groups of two samples; a group is told by its problem's index, counted from `first`."""
    problems = [
        Problem(
            Example([{"role": "user", "content": str(i)}], "gsm8k", "1", i, str(i)),
            (i + 1,),
            get_env("gsm8k"),
        )
        for i in range(first, first + len(rewards))
    ]
    samples = [
        [Sample([problem.example.index + 1] * 2, [-1.0] * 2, reason)] * 2 for problem in problems
    ]
    texts = [[str(problem.example.index)] * 2 for problem in problems]
    return Rollout(NO_MEMBER, problems, samples, texts, torch.tensor(rewards))


def _recipe(kind: str, size: int, **settings: float) -> Recipe:
    keys = [
        f"trainer.algorithm.dynamic_sampling.{name}={value}" for name, value in settings.items()
    ]
    sizes = [
        f"trainer.train_batch_size={size}",
        "trainer.policy_mini_batch_size=1",
        "generator.n_samples_per_prompt=2",
    ]
    return quickstart([f"trainer.algorithm.dynamic_sampling.type={kind}", *keys, *sizes])


def _groups(rollout: Rollout) -> list[int]:
    """Return which groups it holds; all its parts must be of the same ones."""
    indices = [problem.example.index for problem in rollout.problems]
    assert rollout.completions == [[str(i)] * 2 for i in indices]
    assert [group[0].token_ids[0] for group in rollout.samples] == [i + 1 for i in indices]
    return indices


def _rewards(*groups: list[float]) -> torch.Tensor:
    return torch.tensor(groups)


def test_none_trains_on_all_groups() -> None:
    recipe, rewards = _recipe("none", 3), _rewards(BAD, GOOD, SOLVED)
    assert not needs_another_batch(recipe, [rewards])
    assert select_groups(recipe, rewards) == ([0, 1, 2], {})


def test_filter_samples_until_enough_groups_differ() -> None:
    recipe = _recipe("filter", 3)
    batches = [
        _rewards(GOOD, BAD, SOLVED),
        _rewards(BAD, BAD, GOOD),
        _rewards(GOOD, SOLVED, GOOD),
    ]
    assert [needs_another_batch(recipe, batches[: i + 1]) for i in range(3)] == [True, True, False]
    # In the order they were sampled; the ninth is one too many.
    assert select_groups(recipe, torch.cat(batches)) == ([0, 5, 6], {"num_sampled_batches": 3})


def test_filter_needs_one_batch_when_all_groups_differ() -> None:
    recipe, rewards = _recipe("filter", 2), _rewards(GOOD, GOOD)
    assert not needs_another_batch(recipe, [rewards])
    assert select_groups(recipe, rewards) == ([0, 1], {"num_sampled_batches": 1})


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_filter_stops_after_max_sample_batches(limit: int) -> None:
    recipe = _recipe("filter", 2, max_sample_batches=limit)
    batches = [_rewards(BAD, BAD)] * (limit - 1) + [_rewards(BAD, GOOD)]
    asked = [needs_another_batch(recipe, batches[: i + 1]) for i in range(limit)]
    assert asked == [True] * (limit - 1) + [False]
    # The first of the other groups fills the batch.
    chosen = [2 * limit - 1, 0]
    assert select_groups(recipe, torch.cat(batches)) == (chosen, {"num_sampled_batches": limit})


def test_replace_copies_groups_with_signal_in_turn() -> None:
    rewards = _rewards(BAD, GOOD, BAD, GOOD, SOLVED, BAD)
    chosen, metrics = select_groups(_recipe("replace", 6), rewards)
    assert chosen == [1, 1, 3, 3, 1, 3]
    assert metrics == {"num_replaced_groups": 4}


@pytest.mark.parametrize(("ratio", "replaced"), [(0.0, 3), (0.4, 3), (0.41, 0), (1.0, 0)])
def test_replace_asks_for_a_share_of_groups_with_signal(ratio: float, replaced: int) -> None:
    recipe = _recipe("replace", 5, min_replace_ratio=ratio)
    chosen, metrics = select_groups(recipe, _rewards(GOOD, BAD, BAD, GOOD, BAD))
    assert metrics == {"num_replaced_groups": replaced}
    assert chosen == ([0, 0, 3, 3, 0] if replaced else [0, 1, 2, 3, 4])


def test_replace_without_signal_replaces_nothing() -> None:
    recipe = _recipe("replace", 2, min_replace_ratio=0)
    assert select_groups(recipe, _rewards(BAD, SOLVED)) == ([0, 1], {"num_replaced_groups": 0})


def test_selected_groups_keep_their_parts_together() -> None:
    sampled = Rollout.join([_rollout(GOOD, BAD), _rollout(SOLVED, GOOD, first=2)])
    kept = sampled.select([3, 0, 3])
    assert _groups(kept) == [3, 0, 3]
    assert kept.rewards.tolist() == [GOOD] * 3
    prompts = kept.to_batch(0).prompt_ids.flatten().tolist()
    assert prompts == [4, 4, 1, 1, 4, 4]
    # Metrics are those of all that was sampled, not of what was selected.
    assert sampled.statistics()["frac_reward_zero_std"] == pytest.approx(0.5)


def test_the_engine_says_whether_a_completion_was_truncated() -> None:
    # The last token says nothing: it may be the EOS at the very limit, or what looks like one.
    assert _rollout(GOOD, reason="length").truncated.tolist() == [True, True]
    assert _rollout(GOOD, reason="stop").truncated.tolist() == [False, False]
    both = Rollout.join([_rollout(GOOD), _rollout(GOOD, first=1, reason="length")])
    assert both.statistics()["completions/clipped_ratio"] == 0.5
