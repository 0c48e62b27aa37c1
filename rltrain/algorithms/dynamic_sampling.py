"""Dynamic sampling: what to do with groups whose rewards are all equal and so carry no signal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.config.schema import Recipe, Resampling


def groups_with_signal(rewards_PG: torch.Tensor) -> list[int]:
    """Return the indices of the groups whose rewards differ; `[P, G]`."""
    equal_P = (rewards_PG == rewards_PG[:, :1]).all(dim=1)
    return [i for i, equal in enumerate(equal_P.tolist()) if not equal]


def needs_another_batch(recipe: Recipe, rewards: Sequence[torch.Tensor]) -> bool:
    """Return whether to sample again, given the rewards `[P, G]` of the step's batches so far.

    `filter` samples until enough groups have a signal, or for `max_sample_batches` batches (DAPO,
    Yu et al. 2025, eq. 11).
    """
    settings = recipe.trainer.algorithm.dynamic_sampling
    if settings.type is not Resampling.filter or len(rewards) >= settings.max_sample_batches:
        return False
    return len(groups_with_signal(torch.cat(list(rewards)))) < recipe.trainer.train_batch_size


def select_groups(recipe: Recipe, rewards_PG: torch.Tensor) -> tuple[list[int], dict[str, float]]:
    """Return which groups of the sampled ones to train on, in order, and metrics.

    `filter`: the first groups with a signal, then others where they are too few. `replace`: copies
    of the groups with a signal, each in turn, replace the others (POLARIS, An et al. 2025); with
    less than `min_replace_ratio` of them nothing is replaced, for a few groups would count too
    much. `none`: all groups as they are.
    """
    settings, size = recipe.trainer.algorithm.dynamic_sampling, recipe.trainer.train_batch_size
    order = list(range(len(rewards_PG)))
    if settings.type is Resampling.none:
        return order, {}
    good = groups_with_signal(rewards_PG)
    others = sorted(set(order) - set(good))
    if settings.type is Resampling.filter:
        return [*good, *others][:size], {"num_sampled_batches": len(order) // size}
    if good and len(good) >= settings.min_replace_ratio * len(order):
        for turn, index in enumerate(others):
            order[index] = good[turn % len(good)]
    replaced = sum(index != source for index, source in enumerate(order))
    return order, {"num_replaced_groups": replaced}
