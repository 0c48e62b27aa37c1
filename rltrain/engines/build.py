"""Where a pack's engine runs: inside the one process, one inside each rank, or in processes of its
own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.config.schema import Recipe
from rltrain.distributed.cluster import worker_environment
from rltrain.distributed.placement import deterministic_environment
from rltrain.distributed.process_group import Ranks
from rltrain.engines.base import Engine, EngineOptions, Request, Sample, build_engine


def place_engine(recipe: Recipe, model: Any, options: EngineOptions, ranks: Ranks) -> Engine:
    """The engine, or the engines that seem one, that the recipe's placement asks for."""
    if not recipe.trainer.placement.colocate_all:
        return DrivenEngine(_engines_apart(recipe, options) if ranks.first else None, ranks)
    engine = build_engine(recipe, model, options)
    return engine if ranks.size == 1 else DividedEngine(engine, ranks)


def _engines_apart(recipe: Recipe, options: EngineOptions) -> Engine:
    """Engines in the last bundles of the placement group that this rank is in (`bundles`)."""
    import ray

    from rltrain.engines.remote import start_engines

    group, count = ray.util.get_current_placement_group(), recipe.generator.num_inference_engines
    env = worker_environment(recipe.trainer.num_threads or 1, deterministic_environment(recipe))
    first = group.bundle_count - count
    return start_engines(
        recipe, options, count=count, placement_group=group, first_bundle=first, env=env
    )


class DividedEngine:
    """One engine in each rank: every rank draws its share of the samples, and gets everyone's."""

    shares_weights = False

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self._engine = engine
        self._ranks = ranks

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples `[P][G]` in the order of the requests, which every rank must give alike."""
        own = self._engine.generate([requests[i] for i in self._ranks.share(len(requests))])
        return self._ranks.interleave(own, len(requests))

    def load_adapter(self, member: str, version: int, path: Path) -> None:
        """Serve `member` from the PEFT folder `path` on every rank."""
        self._engine.load_adapter(member, version, path)

    def load_adapter_tensors(
        self, member: str, version: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        """Serve `member` from these tensors on every rank."""
        self._engine.load_adapter_tensors(member, version, tensors, config)

    def drop_adapter(self, member: str) -> None:
        """Forget the member's adapter on every rank."""
        self._engine.drop_adapter(member)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights of every rank's engine."""
        self._engine.load_weights(weights)

    def use_model(self, model: Any) -> None:
        """These engines have weights of their own."""

    def sleep(self) -> None:
        """Put this rank's engine to sleep."""
        self._engine.sleep()

    def wake(self) -> None:
        """Wake this rank's engine."""
        self._engine.wake()

    def close(self) -> None:
        """Shut this rank's engine down."""
        self._engine.close()


class DrivenEngine:
    """Engines in processes of their own: the first rank speaks with them, every rank gets the
    samples.
    """

    shares_weights = False

    def __init__(self, engine: Engine | None, ranks: Ranks) -> None:
        self._engine = engine
        self._ranks = ranks

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples `[P][G]` in the order of the requests."""
        return self._ranks.once(lambda: self._driven.generate(requests))

    def load_adapter(self, member: str, version: int, path: Path) -> None:
        """Serve `member` from the PEFT folder `path`."""
        self._ranks.once(lambda: self._driven.load_adapter(member, version, path))

    def load_adapter_tensors(
        self, member: str, version: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        """Serve `member` from these tensors."""
        self._ranks.once(
            lambda: self._driven.load_adapter_tensors(member, version, tensors, config)
        )

    def drop_adapter(self, member: str) -> None:
        """Forget the member's adapter."""
        self._ranks.once(lambda: self._driven.drop_adapter(member))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the engines' weights; every rank must iterate, for sharded weights are gathered
        on the way.
        """
        if self._ranks.first:
            self._driven.load_weights(weights)
        else:
            for _ in weights:
                pass
        self._ranks.once(lambda: None)

    def use_model(self, model: Any) -> None:
        """These engines have weights of their own."""

    def sleep(self) -> None:
        """They have devices of their own: nobody needs their memory."""

    def wake(self) -> None:
        """They never slept."""

    def close(self) -> None:
        """Shut the engines down."""
        if self._engine is not None:
            self._engine.close()

    @property
    def _driven(self) -> Engine:
        assert self._engine is not None
        return self._engine
