"""Engines in processes of their own: Ray actors that each build one, and the engine that divides
work among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

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

OURS = (UserError, SyncError)
"""Errors that leave an actor as they are; others come as Ray's, which hold the actor's traceback.
"""


class EngineInParts(Engine, Protocol):
    """An engine that takes new weights part by part, for no message holds a whole model."""

    def load_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, last: bool = True
    ) -> None:
        """As the engine's, in one call or in several of which the last has `last` set."""


class EngineServer:
    """What runs in an actor's process: one engine, built there."""

    def start(self, recipe: Recipe, options: EngineOptions) -> None:
        """Build the engine that the recipe names; raises what building it raises."""
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
        self._engine = cast(EngineInParts, engine)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Have the engine do what its method of that name does."""
        return getattr(self._engine, method)(*args, **kwargs)


class RemoteEngines:
    """Engines behind actor handles as one: every engine serves the same weights, and each a share
    of the prompts.
    """

    shares_weights = False

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Samples `[P][G]` in the order of the requests; prompts go round robin, all samples of one
        to one engine.
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
        """As `load_adapter`; the tensors are stored once, for all engines."""
        import ray

        stored = ray.put({name: tensor.cpu() for name, tensor in tensors.items()})
        self._all("load_adapter_tensors", member, version, stored, config)

    def drop_adapter(self, member: str) -> None:
        """Forget the member's adapter; a member that has none is no error."""
        self._all("drop_adapter", member)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights, part by part: at most one part (`in_parts`) of them is in Ray's
        store at a time.
        """
        import ray

        for part in in_parts(weights):
            self._all(
                "load_weights", ray.put([(name, tensor.cpu()) for name, tensor in part]), last=False
            )
        self._all("load_weights", [])

    def use_model(self, model: Any) -> None:
        """The engines have weights of their own."""

    def sleep(self) -> None:
        """Have every engine give its memory back."""
        self._all("sleep")

    def wake(self) -> None:
        """Have every engine undo `sleep`."""
        self._all("wake")

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
    """`count` engines (`generator.num_inference_engines`), each in an actor with the CPUs and GPUs
    that it uses.

    In a placement group engine i takes bundle `first_bundle` + i. Ray must be up; this waits until
    all engines are.
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
    """What calls to actors return, in order; all are made before the first is waited for."""
    import ray

    try:
        return ray.get(list(calls))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OURS):
            raise error.cause from error
        raise
