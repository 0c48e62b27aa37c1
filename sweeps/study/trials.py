"""A sweep's trials as runs: their recipes and directories, and how one is run again alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.config.validate import num_processes
from harness.core.errors import UserError
from harness.records import manifest
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from rltrain.distributed.gpus import Gpus
from rltrain.distributed.placement import bundles, needs_workers, uses_gpus
from rltrain.tools.fit import gpus_to_plan_for, runs_together
from sweeps.study import sizing
from sweeps.study.plan import Plan
from sweeps.study.space import PLACES, from_recipe
from sweeps.study.study import Study, Trial

RANK = "trainer.policy.model.lora.rank"
_ENDED = (Status.COMPLETE, Status.PRUNED, Status.FAILED)
_FINAL = {TrialState.PRUNED: Status.PRUNED, TrialState.FAIL: Status.FAILED}


def settle(recipe: Recipe, gpus: Gpus | None = None) -> Recipe:
    """The recipe with its packs, their size and the trials' threads written out: resumed elsewhere
    they stay as many.

    `gpus` are those to plan for; None: those that are there.
    """
    plan = Plan(recipe, from_recipe(recipe), ())
    gpus = gpus or gpus_to_plan_for(recipe, None)
    packs = sizing.num_packs(recipe, gpus, plan.num_runs)
    size = sizing.pack_size(recipe, largest(plan)[0], gpus, plan.num_runs, packs)
    settled = recipes.with_values(recipe, {"sweep.max_concurrent": packs, "sweep.pack_size": size})
    return recipes.with_values(settled, {"trainer.num_threads": cpus_per_trial(settled)})


def largest(plan: Plan) -> list[Recipe]:
    """The recipes that take most memory: a trial of the largest rank, and full fine-tuning, alone,
    where it is one.
    """
    swept = any(axis.key == RANK for axis in plan.space.axes)
    ranks = plan.space[RANK].bounds() if swept else (plan.recipe.trainer.policy.model.lora.rank,)
    wanted: list[dict[str, Any]] = []
    if max(ranks) > 0:
        wanted.append({RANK: int(max(ranks)), "generator.max_lora_rank": engine_rank(plan)})
    if min(ranks) == 0:
        wanted.append({RANK: 0, "generator.max_lora_rank": None, "sweep.pack_size": 1})
    found = []
    for values in wanted:
        with contextlib.suppress(UserError):  # what the recipe refuses is no trial
            found.append(recipes.with_values(plan.recipe, values))
    return found or [plan.recipe]


def engine_rank(plan: Plan) -> int | None:
    """The largest rank in the space, for which every trial's engine has room, so that all can share
    one.
    """
    ranks = [plan.recipe.trainer.policy.model.lora.rank]
    if any(axis.key == RANK for axis in plan.space.axes):
        ranks = [int(rank) for rank in plan.space[RANK].bounds()]
    return plan.recipe.generator.max_lora_rank or max(ranks) or None


def cpus_per_trial(recipe: Recipe) -> int:
    """CPU threads that each process of a trial computes with."""
    together = packs_at_once(recipe) * num_processes(recipe)
    return recipe.trainer.num_threads or max(1, (os.cpu_count() or 1) // together)


def server_bundles(recipe: Recipe) -> list[dict[str, float]]:
    """What one place holds: the process of a pack or a trial; for one that leads, its ranks and
    engines too.
    """
    if needs_workers(recipe):
        return [{"CPU": 1.0}, *bundles(recipe)]
    return [{"CPU": float(cpus_per_trial(recipe)), "GPU": float(uses_gpus(recipe))}]


def packs_at_once(recipe: Recipe) -> int:
    """How many packs of a settled sweep train at a time."""
    assert recipe.sweep is not None
    return recipe.sweep.max_concurrent or 1


def trials_per_place(recipe: Recipe) -> int:
    """How many trials of a settled sweep train together at a place."""
    return runs_together(recipe)


def trials_at_once(recipe: Recipe) -> int:
    """How many trials of a sweep train at a time, at most."""
    return packs_at_once(recipe) * trials_per_place(recipe)


def at_a_time(recipe: Recipe) -> str:
    """How many trials run at a time, in words."""
    places, together = packs_at_once(recipe), trials_per_place(recipe)
    packs = (
        f" in {places} pack{'s' * (places > 1)} of {together} on one base" if together > 1 else ""
    )
    return f"{trials_at_once(recipe)} at a time{packs}"


def gpus_per_place(recipe: Recipe) -> int:
    """GPUs that one place holds; 0 when it trains on the CPU."""
    return int(sum(bundle.get("GPU", 0.0) for bundle in server_bundles(recipe)))


def trial_values(plan: Plan, trial: Trial) -> dict[str, Any]:
    """What a trial's recipe sets, by key: its parameters, its seed, and what it shares with the
    other trials.
    """
    shared = {
        "generator.max_lora_rank": engine_rank(plan),
        "trainer.num_threads": plan.recipe.trainer.num_threads,
    }
    return {
        **{k: v for k, v in shared.items() if v is not None},
        **trial.params,
        "seed": trial.seed,
    }


def trial_recipe(plan: Plan, trial: Trial, sweep_dir: RunDir) -> Recipe:
    """A trial's own recipe, from the sweep's settled one."""
    place = sweep_dir.trial(trial.number)
    values = {
        "sweep": None,
        "trainer.ckpt_path": str(place.path.parent),
        "trainer.run_name": place.path.name,
        "trainer.resume_mode": "latest",
    }
    return recipes.with_values(plan.recipe, values | trial_values(plan, trial))


def create(plan: Plan, trial: Trial, sweep_dir: RunDir) -> RunDir:
    """A trial's directory with recipe and manifest; one that an earlier process left is gone on
    with.

    Raises UserError when that one is another trial's.
    """
    run_dir = sweep_dir.trial(trial.number)
    if run_dir.manifest.exists():
        check_same(trial, run_dir)
    else:
        own, sweep = trial_recipe(plan, trial, sweep_dir), sweep_dir.read_manifest()
        record = manifest.build(
            own,
            kind="trial",
            name=f"{sweep_dir.path.name}/{run_dir.path.name}",
            source=sweep["recipe"]["source"],
            overrides=rerun_overrides(plan, trial, sweep["recipe"]["overrides"]),
            command=manifest.this_command(),
            trial={
                "number": trial.number,
                "configuration": trial.configuration,
                "seed": trial.seed,
                "params": trial.params,
                "confirm": trial.confirm,
            },
            inputs=manifest.versions(sweep)[-1],
        )
        run_dir.create(recipes.to_yaml(own), record)
    return run_dir


def changed_inputs(sweep_dir: RunDir) -> list[manifest.Difference]:
    """What of the sweep's inputs, and of those that its trials name beside them, is another than is
    recorded.
    """
    record = sweep_dir.read_manifest()
    version = manifest.versions(record)[-1]
    records = [run_dir.read_manifest() for run_dir in _directories(sweep_dir)]
    latest = [one for one in records if manifest.versions(one)[-1] == version]
    return list(
        dict.fromkeys(
            change for one in (record, *latest) for change in manifest.changed_inputs(one)
        )
    )


def accept_inputs(sweep_dir: RunDir) -> None:
    """Record the inputs as they are now, in the sweep's manifest and in those of the trials that go
    on with them.

    A trial that ended keeps its record, and with it the former inputs, unless none of its own
    changed.
    """
    version = manifest.versions(sweep_dir.read_manifest())[-1]
    for run_dir in _directories(sweep_dir):
        record = run_dir.read_manifest()
        ended = run_dir.status in _ENDED and bool(manifest.changed_inputs(record))
        if not ended and manifest.versions(record)[-1] >= version:
            manifest.accept_inputs(run_dir, version + 1)
    # Last: a kill before it leaves a sweep whose inputs are still the former ones, to be asked
    # about again.
    manifest.accept_inputs(sweep_dir, version + 1)


def on_former_inputs(sweep_dir: RunDir) -> frozenset[int]:
    """The trials that were trained, in part or whole, on other inputs than the sweep has now."""
    now = manifest.versions(sweep_dir.read_manifest())[-1:]
    found = [
        run_dir
        for run_dir in _directories(sweep_dir)
        if manifest.versions(run_dir.read_manifest()) != now
    ]
    return frozenset(int(run_dir.path.name) for run_dir in found)


def _directories(sweep_dir: RunDir) -> list[RunDir]:
    """The directories of the sweep's trials that have a manifest, by number."""
    files = sweep_dir.trials.glob("*/manifest.json")
    return [
        sweep_dir.trial(int(file.parent.name))
        for file in sorted(files)
        if file.parent.name.isdigit()
    ]


def rerun_overrides(plan: Plan, trial: Trial, given: Sequence[str]) -> list[str]:
    """The overrides with which `harness.run` makes of the sweep's recipe file the very recipe of a
    trial.
    """
    values = trial_values(plan, trial)
    dropped = {"sweep", "trainer.seed", *PLACES, *values}
    kept = [
        o
        for o in given
        if (key := o.split("=", 1)[0]) not in dropped and not key.startswith("sweep.")
    ]
    return kept + [recipes.override_for(key, value) for key, value in values.items()]


def last_step(run_dir: RunDir) -> int:
    """The last step that a run has logged; 0 before the first, and where the log is damaged."""
    log = MetricsFile(run_dir.metrics)
    rows = log.rows() if log.damage() is None else []
    return int(rows[-1]["step"]) if rows else 0


def final_value(run_dir: RunDir, metric: str) -> tuple[float | None, int]:
    """The last value that a run logged of a metric, None if it logged none; and its last step."""
    rows = MetricsFile(run_dir.metrics).rows()
    values = [row[metric] for row in rows if metric in row]
    return (values[-1] if values else None), int(rows[-1]["step"]) if rows else 0


def reconcile(study: Study, sweep_dir: RunDir) -> None:
    """Bring study and manifests to agree after a kill: what a run ended is told, what the study
    ended is recorded.

    Raises UserError when the directories show that the journal has lost trials.
    """
    sweep_dir.tidy()
    _check_none_lost(len(study.trials()), sweep_dir)
    for record in study.trials():
        run_dir = sweep_dir.trial(record.number)
        if run_dir.manifest.exists():
            _reconcile_one(study, record, run_dir)


def _reconcile_one(study: Study, record: FrozenTrial, run_dir: RunDir) -> None:
    status, running = run_dir.status, record.state is TrialState.RUNNING
    if running and status is Status.COMPLETE:
        reason = study.complete(record.number, *final_value(run_dir, study.plan.sweep.metric))
        if reason is not None:
            run_dir.update(reason=reason)
    elif running and status is Status.FAILED:
        study.fail(record.number, run_dir.read_manifest()["reason"])
    elif running and status is Status.RUNNING:
        _report_logged(study, record, run_dir)
    elif record.state in _FINAL and status in (Status.CREATED, Status.RUNNING):
        run_dir.move_to(_FINAL[record.state], reason=record.user_attrs.get("reason"))
    elif record.state is TrialState.FAIL and status is Status.COMPLETE:
        run_dir.update(reason=record.user_attrs.get("reason"))


def _report_logged(study: Study, record: FrozenTrial, run_dir: RunDir) -> None:
    """Tell the study of evaluations that a killed trial had logged: those before its checkpoint do
    not come again.

    A damaged log is for the trial to set right.
    """
    metric, log = study.plan.sweep.metric, MetricsFile(run_dir.metrics)
    for row in log.rows() if log.damage() is None else ():
        step = int(row["step"])
        if metric in row and step > 0 and step not in record.intermediate_values:
            reason = study.report(record.number, step, row[metric])
            if reason is not None:
                run_dir.move_to(Status.PRUNED, reason=reason)
                return


def check_same(trial: Trial, run_dir: RunDir) -> None:
    """Raise UserError unless a directory is that of a trial: a journal that lost lines may ask for
    another.
    """
    there, wanted = run_dir.sound_manifest()["trial"], {"seed": trial.seed, "params": trial.params}
    differ = [
        key
        for key, value in wanted.items()
        if not isinstance(there, dict) or there.get(key) != value
    ]
    if differ:
        raise _lost(run_dir, f"its {' and '.join(differ)} differ from what the study asks")


def _check_none_lost(known: int, sweep_dir: RunDir) -> None:
    """A trial is in the journal before its directory is made; at most the last line can have been
    cut off.
    """
    folders = sweep_dir.trials.iterdir() if sweep_dir.trials.is_dir() else ()
    for number in sorted(int(folder.name) for folder in folders if folder.name.isdigit()):
        run_dir = sweep_dir.trial(number)
        if number > known or (
            number == known and run_dir.manifest.exists() and run_dir.status in _ENDED
        ):
            raise _lost(run_dir, "the study has no such trial")


def _lost(run_dir: RunDir, how: str) -> UserError:
    return UserError(
        "the study's journal has lost lines",
        got=f"{run_dir.path}: {how}",
        fix="put a copy of study.journal back; nothing was changed",
    )
