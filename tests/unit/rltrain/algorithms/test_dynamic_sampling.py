"""Dynamic sampling on rollouts made by hand: what is trained on, how often is sampled, what is
counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.config.schema import Recipe, Resampling
from rltrain.algorithms.dynamic_sampling import RESAMPLING, Collector
from rltrain.data.files import Example
from rltrain.engines.base import Sample
from rltrain.envs import get_env
from rltrain.envs.problems import Problem
from rltrain.scored import Rollout
from tests.recipes import quickstart

GOOD, BAD, SOLVED = [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]
NO_MEMBER: Any = None  # collectors pass it on, nothing more


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


def _collector(kind: str, size: int, **settings: float) -> Collector:
    recipe = _recipe(kind, size, **settings)
    return RESAMPLING[recipe.trainer.algorithm.dynamic_sampling.type](recipe)


def _groups(rollout: Rollout) -> list[int]:
    """Which groups it holds; all its parts must be of the same ones."""
    indices = [problem.example.index for problem in rollout.problems]
    assert rollout.completions == [[str(i)] * 2 for i in indices]
    assert [group[0].token_ids[0] for group in rollout.samples] == [i + 1 for i in indices]
    return indices


def test_every_way_of_the_schema_is_registered() -> None:
    assert set(RESAMPLING) == set(Resampling)


def test_none_trains_on_the_first_batch_as_it_is() -> None:
    collector = _collector("none", 3)
    assert not collector.add(_rollout(BAD, GOOD, SOLVED))
    kept, stats = collector.result()
    assert _groups(kept) == [0, 1, 2]
    assert stats["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert stats["reward"] == pytest.approx(0.5)
    assert "num_sampled_batches" not in stats


def test_filter_samples_until_enough_groups_differ() -> None:
    collector = _collector("filter", 3)
    assert collector.add(_rollout(GOOD, BAD, SOLVED))
    assert collector.add(_rollout(BAD, BAD, GOOD, first=3))
    assert not collector.add(_rollout(GOOD, SOLVED, GOOD, first=6))
    kept, stats = collector.result()
    assert _groups(kept) == [0, 5, 6]  # in the order they were drawn; the ninth is one too many
    assert kept.rewards.tolist() == [GOOD] * 3
    assert stats["num_sampled_batches"] == 3
    # Statistics are those of the policy, not of what was picked from it.
    assert stats["frac_reward_zero_std"] == pytest.approx(5 / 9)
    assert stats["reward"] == pytest.approx((4 * 0.5 + 2 * 1.0) / 9)


def test_filter_is_content_with_a_first_batch_that_is_good() -> None:
    collector = _collector("filter", 2)
    assert not collector.add(_rollout(GOOD, GOOD))
    kept, stats = collector.result()
    assert _groups(kept) == [0, 1]
    assert stats["num_sampled_batches"] == 1


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_filter_gives_up_after_so_many_batches(limit: int) -> None:
    collector = _collector("filter", 2, max_sample_batches=limit)
    wanted = [collector.add(_rollout(BAD, BAD, first=2 * turn)) for turn in range(limit - 1)]
    assert wanted == [True] * (limit - 1)
    last = 2 * (limit - 1)
    assert not collector.add(_rollout(BAD, GOOD, first=last))
    kept, stats = collector.result()
    # What is missing is filled with the first of the others, so that the batch has its size.
    assert _groups(kept) == [last + 1, 0]
    assert stats["num_sampled_batches"] == limit


def test_replace_puts_copies_of_good_groups_in_turn_in_the_others_places() -> None:
    collector = _collector("replace", 6)
    assert not collector.add(_rollout(BAD, GOOD, BAD, GOOD, SOLVED, BAD))
    kept, stats = collector.result()
    assert _groups(kept) == [1, 1, 3, 3, 1, 3]
    assert kept.rewards.tolist() == [GOOD] * 6
    assert stats["num_replaced_groups"] == 4
    assert stats["frac_reward_zero_std"] == pytest.approx(4 / 6)
    batch = kept.batch(0)
    assert batch.prompt_ids.flatten().tolist() == [2, 2, 2, 2, 4, 4, 4, 4, 2, 2, 4, 4]


@pytest.mark.parametrize(("ratio", "replaced"), [(0.0, 3), (0.4, 3), (0.41, 0), (1.0, 0)])
def test_replace_wants_a_least_share_of_good_groups(ratio: float, replaced: int) -> None:
    collector = _collector("replace", 5, min_replace_ratio=ratio)
    collector.add(_rollout(GOOD, BAD, BAD, GOOD, BAD))
    kept, stats = collector.result()
    assert stats["num_replaced_groups"] == replaced
    assert _groups(kept) == ([0, 0, 3, 3, 0] if replaced else [0, 1, 2, 3, 4])


def test_replace_without_one_good_group_has_nothing_to_copy() -> None:
    collector = _collector("replace", 2, min_replace_ratio=0)
    collector.add(_rollout(BAD, SOLVED))
    kept, stats = collector.result()
    assert _groups(kept) == [0, 1]
    assert stats["num_replaced_groups"] == 0


def test_whether_a_completion_was_cut_is_the_engines_to_say() -> None:
    # The last token says nothing: it may be the EOS at the very limit, or what looks like one.
    assert _rollout(GOOD, reason="length").cut.tolist() == [True, True]
    assert _rollout(GOOD, reason="stop").cut.tolist() == [False, False]
    both = Rollout.join([_rollout(GOOD), _rollout(GOOD, first=1, reason="length")])
    assert both.statistics()["completions/clipped_ratio"] == 0.5
