"""Engines in Ray actors, and the engine that divides requests among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.schema import Recipe
from harness.core.errors import UserError
from rltrain.distributed import placement as parallel
from rltrain.distributed.process import quiet_libraries
from rltrain.engines.base import (
    Engine,
    EngineOptions,
    Request,
    Sample,
    SyncError,
    build_engine,
    in_parts,
)

if TYPE_CHECKING:
    import torch

UNWRAPPED_ERRORS = (UserError, SyncError)
"""Errors raised as they are; others are raised as Ray's, which hold the actor's traceback."""


class EngineServer:
    """Runs in an actor's process: builds an engine and calls its methods."""

    def start(self, recipe: Recipe, options: EngineOptions) -> None:
        """Build the engine that the recipe names; raise what building it raises."""
        quiet_libraries()
        parallel.prepare_process(recipe)
        engine = build_engine(recipe, None, options)
        if engine.shares_weights:
            raise UserError(
                "an engine that samples from the trainer's own modules cannot run in a "
                "process of its own",
                got=f"generator.backend={recipe.generator.backend.name}",
                fix="set generator.backend=vllm, or trainer.placement.colocate_all=true",
            )
        self._engine = engine

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call the engine's method of that name."""
        return getattr(self._engine, method)(*args, **kwargs)


class RemoteEngines(Engine):
    """Several engines in actors behind one object; all serve the same weights.

    They have devices of their own, so `sleep` and `wake` do nothing.
    """

    shares_weights = False

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Return samples `[P][G]` in the order of the requests.

        Prompts are assigned round robin; all samples of a prompt come from one engine.
        """
        count = len(self._actors)
        shares = [list(requests[i::count]) for i in range(min(count, len(requests)))]
        parts = _results(
            actor.call.remote("generate", share)
            for actor, share in zip(self._actors, shares, strict=False)
        )
        return [parts[i % count][i // count] for i in range(len(requests))]

    def load_adapter(self, member: str, version: int, path: Path) -> None:
        """Serve `member` from the PEFT folder `path`, which every engine's machine must see."""
        self._all("load_adapter", member, version, path)

    def load_adapter_tensors(
        self, member: str, version: int, tensors: dict[str, torch.Tensor], config: dict[str, Any]
    ) -> None:
        """Serve `member` from tensors, which are stored once for all engines."""
        import ray

        stored = ray.put({name: tensor.cpu() for name, tensor in tensors.items()})
        self._all("load_adapter_tensors", member, version, stored, config)

    def drop_adapter(self, member: str) -> None:
        """Remove the member's adapter; a member without one is no error."""
        self._all("drop_adapter", member)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights; Ray's store holds one part (`in_parts`) of them at a time.

        The engines' `load_weights` must accept `last`, as vLLM's does.
        """
        import ray

        for part in in_parts(weights):
            self._all(
                "load_weights", ray.put([(name, tensor.cpu()) for name, tensor in part]), last=False
            )
        self._all("load_weights", [])

    def close(self) -> None:
        """Shut the engines down, then their processes."""
        import ray

        actors, self._actors = self._actors, []
        try:
            _results(actor.call.remote("close") for actor in actors)
        finally:
            for actor in actors:
                ray.kill(actor)

    def _all(self, method: str, *args: Any, **kwargs: Any) -> None:
        _results(actor.call.remote(method, *args, **kwargs) for actor in self._actors)


def start_engines(
    recipe: Recipe,
    options: EngineOptions,
    *,
    count: int | None = None,
    placement_group: Any = None,
    first_bundle: int = 0,
    env: Mapping[str, str] | None = None,
) -> RemoteEngines:
    """Start `count` engines (default `generator.num_inference_engines`), each in an actor.

    An actor gets the CPUs and GPUs that its engine uses. In a placement group engine i gets bundle
    `first_bundle` + i. Ray must be up; this waits until all engines are.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    on_gpu = parallel.device_of(recipe).type == "cuda"
    processes = recipe.generator.inference_engine_tensor_parallel_size
    settings = {
        "num_cpus": (recipe.trainer.num_threads or 1) * (1 if on_gpu else processes),
        "num_gpus": processes if on_gpu else 0,
        "runtime_env": {"env_vars": dict(env or {})},
    }
    actors = []
    for i in range(recipe.generator.num_inference_engines if count is None else count):
        if placement_group is not None:
            settings["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group, first_bundle + i
            )
        actors.append(ray.remote(EngineServer).options(**settings).remote())
    try:
        _results(actor.start.remote(recipe, options) for actor in actors)
    except BaseException:
        for actor in actors:
            ray.kill(actor)
        raise
    return RemoteEngines(actors)


def _results(calls: Iterable[Any]) -> list[Any]:
    """Return the results of actor calls, in order; all are made before the first is awaited."""
    import ray

    try:
        return ray.get(list(calls))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UNWRAPPED_ERRORS):
            raise error.cause from error
        raise
