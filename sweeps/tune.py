"""Ray Tune runs a study's trials: its searcher asks and tells the study, its scheduler asks the study's pruner."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from harness.rundir import RunDir
from harness.schema import Recipe
from rltrain.cluster import cluster
from rltrain.parallel import address_of
from sweeps import trials
from sweeps.ledger import Ledger
from sweeps.progress import Progress
from sweeps.study import Study


def run(sweep_dir: RunDir, study: Study, progress: Progress, actor: Callable[[], type] | None = None) -> None:
    """Run every trial that the study has left; `actor` makes the Trainable, by default the trainer's.

    A failed trial is recorded and not tried again. KeyboardInterrupt leaves the running ones RUNNING, to be resumed.
    """
    ledger = Ledger(sweep_dir, study, progress)
    try:
        with _cluster(study.plan.recipe, sweep_dir.path) as scratch, terminable(), progress:
            _fit(ledger, actor or trial_actor, scratch)
    finally:
        ledger.stamp()


def _cluster(recipe: Recipe, owner: Path) -> contextlib.AbstractContextManager[Path]:
    """Ray with room for all trials that run at once; yields the folder for Tune's own files."""
    assert recipe.sweep is not None
    places, needs = recipe.sweep.max_concurrent, trials.trial_bundles(recipe)
    cpus, gpus = (places * sum(bundle.get(kind, 0.0) for bundle in needs) for kind in ("CPU", "GPU"))
    return cluster(owner, cpus=cpus, gpus=gpus, threads=trials.cpus_per_trial(recipe), address=address_of(recipe),
                   scratch="tune")  # fmt: skip


def trial_actor() -> type:
    """The Trainable that trains for real."""
    from sweeps.actor import TrialActor

    return TrialActor


def _fit(ledger: Ledger, actor: Callable[[], type], scratch: Path) -> None:
    from ray import tune
    from ray.tune.execution import class_cache

    from sweeps.searcher import PrunerScheduler, StudySearcher

    # Tune hands the cloud's keys to its workers on their command line, where every user of the machine can read them.
    class_cache.ENV_VARS_TO_PROPAGATE = {n for n in class_cache.ENV_VARS_TO_PROPAGATE if not n.startswith("AWS_")}
    recipe = ledger.study.plan.recipe
    resources = tune.PlacementGroupFactory(trials.trial_bundles(recipe))
    tuner = tune.Tuner(
        tune.with_resources(actor(), resources),
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(ledger),
            scheduler=PrunerScheduler(ledger),
            num_samples=ledger.study.num_left,
            # vLLM does not give all GPU memory back: there, a process per trial.
            reuse_actors=trials.gpus_per_trial(recipe) == 0,
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

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # Only now: starting Ray puts its own handler in place, which ends the process where it stands.
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
