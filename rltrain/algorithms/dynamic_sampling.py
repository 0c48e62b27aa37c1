"""Dynamic sampling: what becomes of groups whose rewards are all equal, and so carry no signal."""

from __future__ import annotations

from typing import Protocol

from harness.config.schema import Recipe, Resampling
from rltrain.scored import Rollout


class Collector(Protocol):
    """Takes the scored batches of one step, and says when there are enough."""

    def add(self, scored: Rollout) -> bool:
        """Take a batch; whether another is wanted."""

    def result(self) -> tuple[Rollout, dict[str, float]]:
        """The groups to train on, as many as a batch has, and metrics."""


class Keep:
    """Trains on the first batch as it is."""

    def __init__(self, recipe: Recipe) -> None:
        self._batch: Rollout | None = None

    def add(self, scored: Rollout) -> bool:
        """Take the batch; one is enough."""
        self._batch = scored
        return False

    def result(self) -> tuple[Rollout, dict[str, float]]:
        """The batch, with its statistics."""
        assert self._batch is not None
        return self._batch, self._batch.statistics()


class Filter:
    """Samples further batches until enough groups have different rewards (DAPO, Yu et al. 2025, eq.
    11).

    Groups are taken in the order they were drawn. After `max_sample_batches` what is missing is
    filled with groups of equal rewards. The statistics are those of everything that was sampled.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._size = recipe.trainer.train_batch_size
        self._limit = recipe.trainer.algorithm.dynamic_sampling.max_sample_batches
        self._batches: list[Rollout] = []

    def add(self, scored: Rollout) -> bool:
        """Take a batch; whether good groups are missing and may still be sampled."""
        self._batches.append(scored)
        found = sum(len(batch.signal()) for batch in self._batches)
        return found < self._size and len(self._batches) < self._limit

    def result(self) -> tuple[Rollout, dict[str, float]]:
        """The first good groups, then others if need be."""
        everything = Rollout.join(self._batches)
        good = everything.signal()
        others = sorted(set(range(len(everything.problems))) - set(good))
        stats = everything.statistics() | {"num_sampled_batches": len(self._batches)}
        return everything.groups([*good, *others][: self._size]), stats


class Replace(Keep):
    """Copies of good groups take the place of the others (POLARIS, An et al. 2025): each good one
    in its turn.

    With less than `min_replace_ratio` of good groups the batch stays as it is, for a few groups
    would count too much.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._least = recipe.trainer.algorithm.dynamic_sampling.min_replace_ratio

    def result(self) -> tuple[Rollout, dict[str, float]]:
        """The batch with its groups replaced."""
        assert self._batch is not None
        batch, count = self._batch, len(self._batch.problems)
        good = batch.signal()
        order = list(range(count))
        if good and len(good) >= self._least * count:
            bad = sorted(set(order) - set(good))
            for turn, place in enumerate(bad):
                order[place] = good[turn % len(good)]
        replaced = sum(place != source for place, source in enumerate(order))
        return batch.groups(order), batch.statistics() | {"num_replaced_groups": replaced}


RESAMPLING: dict[Resampling, type[Keep] | type[Filter] | type[Replace]] = {
    Resampling.none: Keep,
    Resampling.filter: Filter,
    Resampling.replace: Replace,
}
