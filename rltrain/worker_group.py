"""Runs on several processes: Ray places the ranks, torch's process group joins them."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    uses_gpus,
)
from rltrain.distributed.process import quiet_libraries, redirect_output
from rltrain.report import Report
from rltrain.trainer import recorded_failure

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from rltrain.crew import LocalCrew

# Ray reads its settings when it is imported: here only inside functions, after `cluster` has made
# them.

# How long a cluster may take to find the places it has said it has, and a rank to give its engine's
# memory back.
PLACING_SECONDS = 300.0
CLOSING_SECONDS = 60.0


def run_on_workers(recipe: Recipe, run_dir: RunDir) -> Iterator[Report]:
    """Train a run on a group of processes; a report after every step. Any failure is recorded.

    Inside a Ray task or actor (a trial of a sweep) its own placement group must hold the bundles,
    after its own.
    """
    with recorded_failure(run_dir), contextlib.ExitStack() as stack:
        inside = _inside_ray()
        if not inside:
            needs = bundles(recipe)
            cpus, gpus = (sum(bundle[kind] for bundle in needs) for kind in ("CPU", "GPU"))
            store = (
                OBJECT_STORE_BYTES if recipe.trainer.placement.colocate_all else LARGE_STORE_BYTES
            )
            stack.enter_context(
                cluster(
                    cpus=cpus,
                    gpus=gpus,
                    threads=_threads(recipe),
                    address=address_of(recipe),
                    store=store,
                )
            )
        group = _current_group() if inside else None
        workers = stack.enter_context(WorkerGroup(recipe, 1, run_dir.log, group))
        for report in _reports(workers, recipe, run_dir):
            if report.done:
                # Engines and process group go in order before anyone is told that the run is over.
                workers.close()
            yield report


def _reports(workers: WorkerGroup, recipe: Recipe, run_dir: RunDir) -> Iterator[Report]:
    """A run's reports from its first to its last."""
    done = False
    for report in workers.take_in(recipe, run_dir):
        done = report.done
        yield report
    while not done:
        workers.train([run_dir])
        report = workers.take(run_dir)
        done = report.done
        yield report


class WorkerGroup:
    """A crew of ranks in step with each other; a context manager that ends their processes."""

    contains_failures = False

    def __init__(
        self, recipe: Recipe, room: int, log: Path, group: PlacementGroup | None = None
    ) -> None:
        """Ranks for packs of `room` runs at a time, in the bundles of `group` after its first, or
        in a group of their own; `log` is where they write.
        """
        self._recipe = recipe
        self._room = room
        self._log = log
        self._group = group
        self._own: PlacementGroup | None = None
        self._ranks: list[Any] = []

    def __enter__(self) -> WorkerGroup:
        try:
            self._place()
            address = _get(self._ranks[:1], "address")[0]
            _get(self._ranks, "start", address, self._recipe, self._room, self._log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def take_in(self, recipe: Recipe, run_dir: RunDir) -> list[Report]:
        """A run joins every rank's pack; the first rank's reports."""
        reports: list[Report] = _get(self._ranks, "take_in", recipe, run_dir)[0]
        return reports

    def train(self, run_dirs: Sequence[RunDir]) -> None:
        """One step of these runs, which all ranks take together."""
        _get(self._ranks, "train", list(run_dirs))

    def take(self, run_dir: RunDir) -> Report:
        """The first rank's report of the step."""
        report: Report = _get(self._ranks, "take", run_dir)[0]
        return report

    def let_go(self, run_dir: RunDir) -> None:
        """A run leaves every rank's pack."""
        _get(self._ranks, "let_go", run_dir)

    def close(self) -> None:
        """Give the engines' and the models' memory back; the process groups go with the engines."""
        _get(self._ranks, "close", timeout=CLOSING_SECONDS)

    def __exit__(self, *_: object) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for rank in self._ranks:
            ray.kill(rank)
        if self._own is not None:
            remove_placement_group(self._own)

    def _place(self) -> None:
        """Start the ranks where the placement group holds room for them."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        needs = bundles(self._recipe)
        group, first = self._group, 1
        if group is None:
            group = self._own = _reserve(
                needs, apart=not self._recipe.trainer.placement.colocate_all
            )
            first = 0
        threads, per_node = (
            _threads(self._recipe),
            self._recipe.trainer.placement.policy_num_gpus_per_node,
        )
        for rank in range(num_processes(self._recipe)):
            place = PlacementGroupSchedulingStrategy(
                group,
                placement_group_bundle_index=first + rank // per_node,
                placement_group_capture_child_tasks=True,
            )
            options = {
                "num_cpus": threads,
                "num_gpus": int(uses_gpus(self._recipe)),
                "scheduling_strategy": place,
                "runtime_env": {
                    "env_vars": worker_environment(threads, deterministic_environment(self._recipe))
                },
            }
            self._ranks.append(ray.remote(Rank).options(**options).remote(rank))


class Rank:
    """One training process, a Ray actor: forms the process group with the others and trains in step
    with them.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._room = 1
        self._crew: LocalCrew | None = None
        self._meeting: socket.socket | None = None

    def address(self) -> tuple[str, int]:
        """Where the ranks can meet, for the first of them to say: this node's address, and a port
        it listens on.
        """
        import ray

        host: str = ray.util.get_node_ip_address()
        self._meeting = socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        return host, self._meeting.getsockname()[1]

    def start(self, address: tuple[str, int], recipe: Recipe, room: int, log: Path) -> None:
        """Join the process group, load the base and start the engine."""
        redirect_output(log)
        quiet_libraries()
        from rltrain.crew import LocalCrew
        from rltrain.distributed.process_group import Ranks
        from rltrain.pack import Pack

        self._room = room
        ranks = Ranks.form(
            self._rank, num_processes(recipe), address, device_of(recipe), self._meeting
        )
        self._crew = LocalCrew(Pack.open(recipe, room=room, ranks=ranks))

    def take_in(self, recipe: Recipe, run_dir: RunDir) -> list[Report]:
        """A run joins this rank's part of the pack; what a run alone prints is its own log's."""
        if self._room == 1:
            redirect_output(run_dir.log)
        return self._own.take_in(recipe, run_dir)

    def train(self, run_dirs: Sequence[RunDir]) -> None:
        """One step of these runs."""
        self._own.train(run_dirs)

    def take(self, run_dir: RunDir) -> Report:
        """The report of the step."""
        return self._own.take(run_dir)

    def let_go(self, run_dir: RunDir) -> None:
        """A run leaves."""
        self._own.let_go(run_dir)

    def close(self) -> None:
        """Give the engine's and the model's memory back; the process group goes with the engine."""
        if self._crew is not None:
            self._crew.close()

    @property
    def _own(self) -> LocalCrew:
        assert self._crew is not None
        return self._crew


def _inside_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _current_group() -> PlacementGroup | None:
    """The placement group of the Ray actor that this is."""
    import ray

    return ray.util.get_current_placement_group()


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
    """Call a method on all ranks at once; the first failure of any is raised, though others still
    wait for it.
    """
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
            raise RuntimeError(
                f"training process {rank} of {len(ranks)} died: {_first_line(error)}"
            ) from None
    return list(ray.get(calls))


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
