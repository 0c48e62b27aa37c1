"""Worker groups: several processes that train the same runs in step, placed by Ray.

Ray reads its settings when it is imported, so functions here import it after `cluster` made them.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from harness.config.schema import Recipe
from harness.config.validate import num_processes
from harness.core.errors import UserError
from harness.records.run_dir import RunDir
from rltrain.distributed.cluster import (
    LARGE_STORE_BYTES,
    OBJECT_STORE_BYTES,
    cluster,
    worker_environment,
)
from rltrain.distributed.placement import (
    address_of,
    bundles,
    deterministic_environment,
    device_of,
    needs_workers,
    uses_gpus,
)
from rltrain.distributed.process import exits_are_failures, quiet_libraries, redirect_output
from rltrain.distributed.process_group import Ranks
from rltrain.report import StepReport
from rltrain.trainer import Trainer

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

# How long a cluster may take to place processes that it has room for.
PLACING_SECONDS = 300.0
# How long a rank may take to release its engine's memory.
CLOSING_SECONDS = 60.0


def train_run(recipe: Recipe, run_dir: RunDir) -> Iterator[StepReport]:
    """Train a run to its end, from its last checkpoint if it has one.

    It trains in this process, or in a worker group where its placement asks for one. Yields a
    report after each step. An error is recorded as the run's FAILED status and raised; a consumer
    that stops early leaves the run RUNNING.
    """
    with recorded_failure(run_dir), open_trainer(recipe, log=run_dir.log) as trainer:
        reports = trainer.add(recipe, run_dir)
        while not (reports and reports[-1].done):
            yield from reports
            outcome = trainer.step([run_dir])[run_dir.path]
            if isinstance(outcome, Exception):
                raise outcome
            reports = [outcome]
        # Engines and process group end before the consumer learns that the run is over.
        trainer.close()
        yield from reports


def open_trainer(
    recipe: Recipe, *, slots: int = 1, log: Path, group: PlacementGroup | None = None
) -> Trainer | WorkerGroup:
    """Return what trains runs of a recipe's placement: a trainer here, or a worker group.

    `log` and `group` are for the worker group: where its ranks write, and the placement group
    whose bundles after the first they take; None: one of its own.
    """
    if needs_workers(recipe):
        return WorkerGroup(recipe, slots, log, group)
    return Trainer(recipe, slots=slots)


@contextlib.contextmanager
def recorded_failure(run_dir: RunDir) -> Iterator[None]:
    """Record an exception as the run's FAILED status, with its reason, and raise it again."""
    try:
        with exits_are_failures():
            yield
    except Exception as error:
        run_dir.fail(error)
        raise


class WorkerGroup:
    """Ranks that train the same runs in step, each a process with a `Trainer`.

    A context manager that starts the processes and ends them. An error in one rank is raised; the
    group cannot be used after it.
    """

    isolates_failures = False

    def __init__(
        self, recipe: Recipe, slots: int, log: Path, group: PlacementGroup | None = None
    ) -> None:
        self._recipe = recipe
        self._slots = slots
        self._log = log
        self._group = group
        self._stack = contextlib.ExitStack()
        self._ranks: list[Any] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            ray = sys.modules.get("ray")
            if ray is None or not ray.is_initialized():
                stack.enter_context(self._cluster())
            stack.callback(self._kill)
            self._place(stack)
            address = _get(self._ranks[:1], "address")[0]
            _get(self._ranks, "start", address, self._recipe, self._slots, self._log)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, recipe: Recipe, run_dir: RunDir) -> list[StepReport]:
        """Add a run on every rank; see `Trainer.add`."""
        reports: list[StepReport] = _get(self._ranks, "add", recipe, run_dir)[0]
        return reports

    def step(self, run_dirs: Sequence[RunDir]) -> dict[Path, StepReport | Exception]:
        """Take one training step of these runs on every rank; see `Trainer.step`."""
        outcomes: dict[Path, StepReport | Exception]
        outcomes = _get(self._ranks, "call", "step", list(run_dirs))[0]
        return outcomes

    def remove(self, run_dir: RunDir) -> None:
        """Remove a run on every rank."""
        _get(self._ranks, "call", "remove", run_dir)

    def close(self) -> None:
        """Release the memory of engines and models; the process groups end with the engines."""
        _get(self._ranks, "call", "close", timeout=CLOSING_SECONDS)

    def _cluster(self) -> contextlib.AbstractContextManager[Path]:
        needs = bundles(self._recipe)
        cpus, gpus = (sum(bundle[kind] for bundle in needs) for kind in ("CPU", "GPU"))
        shared = self._recipe.trainer.placement.colocate_all
        return cluster(
            cpus=cpus,
            gpus=gpus,
            threads=_threads(self._recipe),
            address=address_of(self._recipe),
            store=OBJECT_STORE_BYTES if shared else LARGE_STORE_BYTES,
        )

    def _place(self, stack: contextlib.ExitStack) -> None:
        """Start the ranks in the bundles of the placement group."""
        import ray
        from ray.util.placement_group import remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group, first = self._group, 1
        if group is None:
            placement = self._recipe.trainer.placement
            group, first = _reserve(bundles(self._recipe), apart=not placement.colocate_all), 0
            stack.callback(remove_placement_group, group)
        threads = _threads(self._recipe)
        per_node = self._recipe.trainer.placement.policy_num_gpus_per_node
        variables = worker_environment(threads, deterministic_environment(self._recipe))
        for rank in range(num_processes(self._recipe)):
            strategy = PlacementGroupSchedulingStrategy(
                group,
                placement_group_bundle_index=first + rank // per_node,
                placement_group_capture_child_tasks=True,
            )
            options = {
                "num_cpus": threads,
                "num_gpus": int(uses_gpus(self._recipe)),
                "scheduling_strategy": strategy,
                "runtime_env": {"env_vars": variables},
            }
            self._ranks.append(ray.remote(Rank).options(**options).remote(rank))

    def _kill(self) -> None:
        import ray

        for rank in self._ranks:
            ray.kill(rank)


class Rank:
    """One process of a worker group, a Ray actor: a `Trainer` in a torch process group."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._slots = 1
        self._socket: socket.socket | None = None
        self._trainer: Trainer | None = None

    def address(self) -> tuple[str, int]:
        """Return the host and port where the ranks meet; the first rank listens there."""
        import ray

        host: str = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        return host, self._socket.getsockname()[1]

    def start(self, address: tuple[str, int], recipe: Recipe, slots: int, log: Path) -> None:
        """Join the process group, load the base and start the engine."""
        redirect_output(log)
        quiet_libraries()
        size, device = num_processes(recipe), device_of(recipe)
        ranks = Ranks.form(self._rank, size, address, device, self._socket)
        self._slots = slots
        self._trainer = Trainer(recipe, slots=slots, ranks=ranks)

    def add(self, recipe: Recipe, run_dir: RunDir) -> list[StepReport]:
        """Add a run; with one slot, what the process prints goes to the run's log."""
        if self._slots == 1:
            redirect_output(run_dir.log)
        reports: list[StepReport] = self.call("add", recipe, run_dir)
        return reports

    def call(self, method: str, *args: object) -> Any:
        """Call a method of the trainer."""
        return getattr(self._trainer, method)(*args)


def _threads(recipe: Recipe) -> int:
    return recipe.trainer.num_threads or 1


def _reserve(needs: Sequence[dict[str, float]], *, apart: bool) -> PlacementGroup:
    """A placement group of a run's own; raises UserError, with what there is, when the cluster has
    no room for it.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    there = ray.cluster_resources()
    asked = {kind: sum(bundle[kind] for bundle in needs) for kind in ("CPU", "GPU")}
    nodes = sum(node["Alive"] for node in ray.nodes())
    # Ranks of several nodes are one bundle a node; engines apart go where there is room.
    strategy = "STRICT_SPREAD" if len(needs) > 1 and not apart else "PACK"
    short = any(asked[kind] > there.get(kind, 0.0) for kind in asked) or (
        strategy != "PACK" and len(needs) > nodes
    )
    group = (
        None
        if short
        else placement_group([{k: v for k, v in b.items() if v} for b in needs], strategy=strategy)
    )
    if group is None or not group.wait(PLACING_SECONDS):
        if group is not None:
            remove_placement_group(group)
        raise UserError(
            "the Ray cluster has no room for trainer.placement",
            got=f"asked for {asked['CPU']:g} CPUs and {asked['GPU']:g} GPUs in "
            f"{len(needs)} bundles",
            allowed=f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs on "
            f"{nodes} nodes",
            fix="lower trainer.placement.policy_num_nodes, policy_num_gpus_per_node or "
            "generator.num_inference_engines",
        )
    return group


def _get(
    ranks: Sequence[Any], method: str, *args: object, timeout: float | None = None
) -> list[Any]:
    """Call a method on all ranks at once; raise the first error, though other ranks still wait."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    calls = [getattr(rank, method).remote(*args) for rank in ranks]
    waiting = list(calls)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=timeout)
        if not done:
            raise TimeoutError(
                f"{len(waiting)} of {len(ranks)} ranks did not finish {method!r} in {timeout:g} s"
            )
        try:
            ray.get(done)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except RayActorError as error:
            rank = calls.index(done[0])
            reason = " ".join(str(error).split())[:300]
            raise RuntimeError(f"training process {rank} of {len(ranks)} died: {reason}") from None
    return list(ray.get(calls))
