"""Ray Tune runs a study's trials: its searcher asks the study, its scheduler asks the pruner."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.schema import Recipe
from harness.core.cli import interrupt_once
from harness.records.run_dir import RunDir
from rltrain.distributed.cluster import cluster
from rltrain.distributed.placement import address_of
from sweeps.execution.controller import StopSweep, TrialController
from sweeps.study import sizing
from sweeps.study.progress import Progress
from sweeps.study.study import Study

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

# What Ray reserves for a trial's own process, which only follows its pack server: next to nothing.
TRIAL_CPUS = 0.001


def run(
    sweep_dir: RunDir, study: Study, progress: Progress, server: Callable[[], type] | None = None
) -> None:
    """Run every trial that the study has left.

    A failed trial is recorded and not tried again. KeyboardInterrupt, a failure of the machine
    (MachineError) and a journal that cannot be written (OSError) leave the running ones RUNNING,
    to be resumed. `server` returns the class of pack servers, `PackServer` by default.
    """
    recipe = study.plan.recipe
    servers = RayPackServers(recipe, sweep_dir, server or pack_server)
    controller = TrialController(sweep_dir, study, progress, servers)
    try:
        with _cluster(recipe) as scratch, terminable(), progress:
            controller.prepare()
            _fit(controller, scratch)
    except StopSweep as stop:
        raise stop.error from None
    finally:
        with contextlib.suppress(OSError):  # a full disk was reported before
            controller.record_seconds()


def pack_server() -> type:
    """Return the class of pack servers that train."""
    from sweeps.execution.pack_server import PackServer

    return PackServer


def _cluster(recipe: Recipe) -> contextlib.AbstractContextManager[Path]:
    """Start Ray with room for all trials that run at once; yield a folder for Tune's files."""
    packs, needs = sizing.num_packs(recipe), sizing.server_bundles(recipe)
    cpus, gpus = (packs * sum(bundle.get(kind, 0.0) for bundle in needs) for kind in ("CPU", "GPU"))
    count = sizing.num_slots(recipe)
    # By default Tune starts its trials' processes one after another.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(count)
    return cluster(
        cpus=cpus + count * TRIAL_CPUS,
        gpus=gpus,
        threads=sizing.threads_per_process(recipe),
        address=address_of(recipe),
        scratch="tune",
    )


class RayPackServers:
    """Pack servers as Ray actors."""

    def __init__(self, recipe: Recipe, sweep_dir: RunDir, server: Callable[[], type]) -> None:
        self._recipe = recipe
        self._sweep_dir = sweep_dir
        self._server = server
        self._actors: dict[str, Any] = {}
        self._groups: dict[str, PlacementGroup] = {}

    def start(self, name: str, run_dir: RunDir, slots: int) -> None:
        """Start a server for trials like this one, with its ranks' resources if it has any."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self._recipe.sweep is not None
        log = self._sweep_dir.packs / f"{name}.txt" if slots > 1 else run_dir.log
        log.parent.mkdir(exist_ok=True)
        server, *ranks = sizing.server_bundles(self._recipe)
        options = {
            "name": name,
            "num_cpus": server["CPU"],
            "num_gpus": server.get("GPU", 0.0),
            # A thread for each trial that waits, one that leaves and one that joins.
            "max_concurrency": 2 * slots + 2,
        }
        if ranks:
            bundles = [{kind: n for kind, n in bundle.items() if n} for bundle in (server, *ranks)]
            self._groups[name] = group = placement_group(bundles)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0
            )
        actor = ray.remote(self._server()).options(**options)
        self._actors[name] = actor.remote(
            str(run_dir.path),
            slots,
            str(log),
            self._recipe.sweep.stall_seconds,
            self._groups.get(name),
        )

    def works(self, name: str) -> bool:
        """Return whether trials can train in a server."""
        import ray

        try:
            return bool(ray.get(self._actors[name].works.remote()))
        except ray.exceptions.RayActorError:
            return False

    def remove(self, name: str, run_dir: RunDir) -> None:
        """Remove a trial from its pack, if it is still in it."""
        self._actors[name].leave.remote(str(run_dir.path))

    def end(self, name: str) -> None:
        """End a server, if it is still running."""
        import ray

        ray.kill(self._actors.pop(name))
        if name in self._groups:
            ray.util.remove_placement_group(self._groups.pop(name))


def _fit(controller: TrialController, scratch: Path) -> None:
    from ray import tune
    from ray.tune.execution import class_cache

    from sweeps.execution.scheduler import PrunerScheduler, StudySearcher
    from sweeps.execution.trial_actor import TrialActor

    # Tune passes the cloud's keys to its workers on their command line, which every user of the
    # machine can read.
    class_cache.ENV_VARS_TO_PROPAGATE = {
        name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")
    }
    resources = tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}])
    tuner = tune.Tuner(
        tune.with_resources(TrialActor, resources),
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(controller),
            scheduler=PrunerScheduler(controller),
            num_samples=-1,  # until the searcher says that none is left
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    tuner.fit()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM stop the sweep as Ctrl-C does, so that it can be resumed elsewhere."""
    # After Ray has started: its own handler ends the process at once.
    before = signal.signal(signal.SIGTERM, interrupt_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
