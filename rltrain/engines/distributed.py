"""Where engines run: in this process, in every rank, or in processes of their own."""

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
    """Build the engine, or the engines behind one object, that the recipe's placement names."""
    if recipe.trainer.placement.colocate_all:
        engine = build_engine(recipe, model, options)
        return engine if ranks.size == 1 else PerRankEngine(engine, ranks)
    if not ranks.first:
        return RankZeroEngine(None, ranks)
    import ray

    from rltrain.engines.remote import start_engines

    # Separate engines have the last bundles of this rank's placement group (`placement.bundles`).
    group, count = ray.util.get_current_placement_group(), recipe.generator.num_inference_engines
    env = worker_environment(recipe.trainer.num_threads or 1, deterministic_environment(recipe))
    first = group.bundle_count - count
    engines = start_engines(
        recipe, options, count=count, placement_group=group, first_bundle=first, env=env
    )
    return RankZeroEngine(engines, ranks)


class PerRankEngine(Engine):
    """One engine in each rank: every rank samples its share, and all ranks get all samples."""

    shares_weights = False

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self._engine = engine
        self._ranks = ranks
        # Every rank loads adapters and weights into its own engine.
        for method in (
            "load_adapter",
            "load_adapter_tensors",
            "drop_adapter",
            "load_weights",
            "sleep",
            "wake",
            "close",
        ):
            setattr(self, method, getattr(engine, method))

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Return samples `[P][G]` in the order of the requests, which all ranks must pass alike."""
        samples = self._engine.generate([requests[i] for i in self._ranks.share(len(requests))])
        return self._ranks.interleave(samples, len(requests))


class RankZeroEngine(Engine):
    """Engines in processes of their own: rank 0 calls them, and all ranks get the samples.

    They have devices of their own, so `sleep` and `wake` do nothing.
    """

    shares_weights = False

    def __init__(self, engine: Engine | None, ranks: Ranks) -> None:
        self._engine = engine
        self._ranks = ranks

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Return samples `[P][G]` in the order of the requests."""
        samples: list[list[Sample]] = self._call("generate", requests)
        return samples

    def load_adapter(self, member: str, version: int, path: Path) -> None:
        """Serve `member` from the PEFT folder `path`."""
        self._call("load_adapter", member, version, path)

    def load_adapter_tensors(
        self, member: str, version: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        """Serve `member` from these tensors."""
        self._call("load_adapter_tensors", member, version, tensors, config)

    def drop_adapter(self, member: str) -> None:
        """Remove the member's adapter."""
        self._call("drop_adapter", member)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the engines' weights. All ranks iterate, which gathers sharded weights."""
        if self._engine is not None:
            self._engine.load_weights(weights)
        else:
            for _ in weights:
                pass
        self._ranks.once(lambda: None)

    def close(self) -> None:
        """Shut the engines down."""
        if self._engine is not None:
            self._engine.close()

    def _call(self, method: str, *args: Any) -> Any:
        """Call a method of the engine on rank 0; return its result, or raise its error, on all."""
        return self._ranks.once(lambda: getattr(self._engine, method)(*args))
