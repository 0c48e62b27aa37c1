"""A sweep's trials as runs: their recipes and directories, and how one is run again alone."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from harness import manifest
from harness import recipe as recipes
from harness.metrics import MetricsFile
from harness.rundir import RunDir, Status
from harness.schema import Device, Recipe
from rltrain.parallel import visible_gpus
from sweeps.space import PLACES, Params, Space
from sweeps.study import Study, Trial

RANK = "trainer.policy.model.lora.rank"
_FINAL = {TrialState.PRUNED: Status.PRUNED, TrialState.FAIL: Status.FAILED}


def settle(recipe: Recipe, space: Space) -> Recipe:
    """The recipe with what its trials share written out: threads, and an engine with room for the largest rank."""
    assert recipe.sweep is not None
    values: dict[str, Any] = {"trainer.num_threads": recipe.trainer.num_threads or cpus_per_trial(recipe)}
    ranks = [recipe.trainer.policy.model.lora.rank]
    if any(axis.key == RANK for axis in space.axes):
        ranks = [int(rank) for rank in space[RANK].bounds()]
    if recipe.generator.max_lora_rank is None and max(ranks) > 0:
        values["generator.max_lora_rank"] = max(ranks)
    return recipes.with_values(recipe, values)


def cpus_per_trial(recipe: Recipe) -> int:
    """CPU cores that one trial computes with."""
    assert recipe.sweep is not None
    return recipe.trainer.num_threads or max(1, (os.cpu_count() or 1) // recipe.sweep.max_concurrent)


def gpus_per_trial(recipe: Recipe) -> int:
    """GPUs that one trial holds; 0 when it trains on the CPU."""
    placement = recipe.trainer.placement
    if placement.device is Device.cpu or (placement.device is Device.auto and visible_gpus() == 0):
        return 0
    return placement.policy_num_gpus_per_node * placement.policy_num_nodes


def trial_values(recipe: Recipe, params: Params, seed: int) -> dict[str, Any]:
    """What a trial's recipe sets, by key: its parameters, its seed, and what it shares with the other trials."""
    shared = {"generator.max_lora_rank": recipe.generator.max_lora_rank,
              "trainer.num_threads": recipe.trainer.num_threads}  # fmt: skip
    return {**{k: v for k, v in shared.items() if v is not None}, **params, "seed": seed}


def trial_recipe(recipe: Recipe, trial: Trial, sweep_dir: RunDir) -> Recipe:
    """A trial's own recipe, from the sweep's settled one."""
    place = sweep_dir.trial(trial.number)
    values = {"sweep": None, "trainer.ckpt_path": str(place.path.parent), "trainer.run_name": place.path.name,
              "trainer.resume_mode": "latest"}  # fmt: skip
    return recipes.with_values(recipe, values | trial_values(recipe, trial.params, trial.seed))


def create(recipe: Recipe, trial: Trial, sweep_dir: RunDir) -> RunDir:
    """A trial's directory with recipe and manifest; one that an earlier process left is gone on with."""
    run_dir = sweep_dir.trial(trial.number)
    if not run_dir.manifest.exists():
        own, sweep = trial_recipe(recipe, trial, sweep_dir), sweep_dir.read_manifest()
        record = manifest.build(
            own,
            kind="trial",
            name=f"{sweep_dir.path.name}/{run_dir.path.name}",
            source=sweep["recipe"]["source"],
            overrides=rerun_overrides(recipe, sweep["recipe"]["overrides"], trial.params, trial.seed),
            command=manifest.this_command(),
            trial={"number": trial.number, "configuration": trial.configuration, "seed": trial.seed,
                   "params": trial.params},
        )  # fmt: skip
        run_dir.create(recipes.to_yaml(own), record)
    return run_dir


def rerun_overrides(recipe: Recipe, given: Sequence[str], params: Params, seed: int) -> list[str]:
    """The overrides with which `harness.run` makes of the sweep's recipe file the very recipe of a trial."""
    values = trial_values(recipe, params, seed)
    dropped = {"sweep", "trainer.seed", *PLACES, *values}
    kept = [o for o in given if (key := o.split("=", 1)[0]) not in dropped and not key.startswith("sweep.")]
    return kept + [recipes.override_for(key, value) for key, value in values.items()]


def rerun_command(source: str, overrides: Sequence[str]) -> str:
    """The command line that runs a trial again, quoted for a shell."""
    return shlex.join(["python", "-m", "harness.run", source, *overrides])


def final_value(run_dir: RunDir, metric: str) -> tuple[float | None, int]:
    """The last value that a run logged of a metric, None if it logged none; and its last step."""
    rows = MetricsFile(run_dir.metrics).rows()
    values = [row[metric] for row in rows if metric in row]
    return (values[-1] if values else None), int(rows[-1]["step"]) if rows else 0


def reconcile(study: Study, sweep_dir: RunDir) -> None:
    """Bring study and manifests to agree after a kill: what a run ended is told, what the study ended is recorded."""
    for record in study.trials():
        run_dir = sweep_dir.trial(record.number)
        if not run_dir.manifest.exists():
            continue
        status = run_dir.status
        if record.state is TrialState.RUNNING and status is Status.COMPLETE:
            study.complete(record.number, *final_value(run_dir, study.plan.sweep.metric))
        elif record.state is TrialState.RUNNING and status is Status.FAILED:
            study.fail(record.number, run_dir.read_manifest()["reason"])
        elif record.state in _FINAL and status in (Status.CREATED, Status.RUNNING):
            run_dir.move_to(_FINAL[record.state], reason=record.user_attrs.get("reason"))


def relative(path: Path) -> str:
    """A path as a person in the working directory would type it."""
    text = os.path.relpath(path)
    return str(path) if text.startswith("..") else text
