"""Ray Tune runs a study's trials: its searcher asks and tells the study, its scheduler asks the
study's pruner.
"""

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
from rltrain.distributed.placement import address_of, needs_workers
from sweeps.execution.controller import Ledger, Stop
from sweeps.study import trials
from sweeps.study.progress import Progress
from sweeps.study.study import Study

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


def run(
    sweep_dir: RunDir, study: Study, progress: Progress, actor: Callable[[], type] | None = None
) -> None:
    """Run every trial that the study has left; `actor` makes the Trainable, by default the
    trainer's.

    A failed trial is recorded and not tried again. KeyboardInterrupt, a failure of the machine
    (MachineError) and a journal that cannot be written (OSError) leave the running ones RUNNING, to
    be resumed.
    """
    recipe = study.plan.recipe
    packed = actor is None and (trials.trials_per_place(recipe) > 1 or not needs_workers(recipe))
    ledger = Ledger(sweep_dir, study, progress, RayHubs(recipe, sweep_dir) if packed else None)
    try:
        with _cluster(recipe) as scratch, terminable(), progress:
            ledger.prepare()
            _fit(
                ledger,
                actor or trial_actor,
                trials.ASKS if packed else trials.place_bundles(recipe),
                scratch,
            )
    except Stop as stop:
        raise stop.error from None
    finally:
        with contextlib.suppress(OSError):  # a full disk has been said already
            ledger.stamp()


def _cluster(recipe: Recipe) -> contextlib.AbstractContextManager[Path]:
    """Ray with room for all trials that run at once; yields the folder for Tune's own files."""
    places, needs = trials.packs_at_once(recipe), trials.place_bundles(recipe)
    cpus, gpus = (
        places * sum(bundle.get(kind, 0.0) for bundle in needs) for kind in ("CPU", "GPU")
    )
    asking = trials.trials_at_once(recipe) * trials.ASKS[0]["CPU"]
    # Tune would start its trials' processes one after another.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(trials.trials_at_once(recipe))
    return cluster(
        cpus=cpus + asking,
        gpus=gpus,
        threads=trials.cpus_per_trial(recipe),
        address=address_of(recipe),
        scratch="tune",
    )


def trial_actor() -> type:
    """The Trainable that trains for real."""
    from sweeps.execution.trial_actor import TrialActor

    return TrialActor


class RayHubs:
    """Hubs as Ray actors, each with what a place holds."""

    def __init__(self, recipe: Recipe, sweep_dir: RunDir) -> None:
        self._recipe = recipe
        self._sweep_dir = sweep_dir
        self._hubs: dict[str, Any] = {}
        self._groups: dict[str, PlacementGroup] = {}

    def open(self, name: str, run_dir: RunDir, room: int) -> None:
        """Start a process for trials like this one, with room for so many at a time."""
        import ray

        from sweeps.execution.pack_server import Hub

        assert self._recipe.sweep is not None
        log = self._sweep_dir.packs / f"{name}.txt" if room > 1 else run_dir.log
        log.parent.mkdir(exist_ok=True)
        own, *ranks = trials.place_bundles(self._recipe)
        # A thread for each trial that waits, one that leaves and one that comes.
        options = {
            "name": name,
            "num_cpus": own["CPU"],
            "num_gpus": own.get("GPU", 0.0),
            "max_concurrency": 2 * room + 2,
        }
        if ranks:
            options["scheduling_strategy"] = self._reserve(name, [own, *ranks])
        hub = ray.remote(Hub).options(**options)
        self._hubs[name] = hub.remote(
            str(run_dir.path),
            room,
            str(log),
            self._recipe.sweep.stall_seconds,
            self._groups.get(name),
        )

    def _reserve(
        self, name: str, needs: list[dict[str, float]]
    ) -> PlacementGroupSchedulingStrategy:
        """Room for a hub and its ranks together; Ray starts the hub when there is."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._groups[name] = placement_group(
            [{kind: n for kind, n in one.items() if n} for one in needs]
        )
        return PlacementGroupSchedulingStrategy(self._groups[name], placement_group_bundle_index=0)

    def lives(self, name: str) -> bool:
        """Whether a process is there to train in."""
        import ray

        try:
            return bool(ray.get(self._hubs[name].works.remote()))
        except ray.exceptions.RayActorError:
            return False

    def leave(self, name: str, run_dir: RunDir) -> None:
        """Take a trial out of its pack, if it is still in it."""
        self._hubs[name].leave.remote(str(run_dir.path))

    def close(self, name: str) -> None:
        """End a process, if it is still there."""
        import ray

        ray.kill(self._hubs.pop(name))
        if name in self._groups:
            ray.util.remove_placement_group(self._groups.pop(name))


def _fit(
    ledger: Ledger, actor: Callable[[], type], needs: list[dict[str, float]], scratch: Path
) -> None:
    from ray import tune
    from ray.tune.execution import class_cache

    from sweeps.execution.scheduler import PrunerScheduler, StudySearcher

    # Tune hands the cloud's keys to its workers on their command line, where every user of the
    # machine can read them.
    class_cache.ENV_VARS_TO_PROPAGATE = {
        n for n in class_cache.ENV_VARS_TO_PROPAGATE if not n.startswith("AWS_")
    }
    resources = tune.PlacementGroupFactory(needs)
    tuner = tune.Tuner(
        tune.with_resources(actor(), resources),
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(ledger),
            scheduler=PrunerScheduler(ledger),
            num_samples=-1,  # until the searcher says that none is left
            # vLLM does not give all GPU memory back: what trains itself trains one trial.
            reuse_actors=not any(bundle.get("GPU") for bundle in needs),
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
    """SIGTERM stops the sweep as Ctrl-C does: a preempted machine's sweep is resumed elsewhere."""

    # Only now: starting Ray puts its own handler in place, which ends the process where it stands.
    before = signal.signal(signal.SIGTERM, interrupt_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
