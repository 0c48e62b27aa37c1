"""A sweep from its first to its last trial, over one or more processes: start, resume, run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.config import recipe as recipes
from harness.config.digest import exempt_from
from harness.config.recipe_keys import flatten
from harness.config.schema import Recipe
from harness.core.cli import invocation
from harness.core.errors import MachineError, UserError, machine_error
from harness.core.paths import shown
from harness.records import manifest
from harness.records.files import write_text
from harness.records.run_dir import RunDir, Status, run_dir_for
from rltrain.distributed.cluster import gpus_of
from rltrain.distributed.gpus import Gpus
from rltrain.distributed.placement import address_of, uses_gpus, visible_gpus
from rltrain.models import adapter_start
from rltrain.models.adapter_files import KEY
from rltrain.tools.fit import gpus_to_plan_for, note_fit
from rltrain.tools.preflight import check_run
from sweeps.execution import tune
from sweeps.study import plan as plans
from sweeps.study import sizing, trials
from sweeps.study.plan import Plan
from sweeps.study.progress import Progress
from sweeps.study.study import Study

# What a sweep chooses when it starts, where its recipe leaves it open.
SETTLED = ("trainer.num_threads", "sweep.max_concurrent", "sweep.pack_size")
RUNS_ALREADY = "another process is running this sweep"


@dataclass(frozen=True)
class Session:
    """A sweep that is ready to run.

    Attributes:
        plan: the plan of its settled recipe.
        sweep_dir: its directory.
        confirm: how many of the best configurations to run again on fresh seeds; None: as many as
            the study already has to confirm.
        changed_inputs: whether to continue although the model, the data or the environment module
            changed since the sweep started.
    """

    plan: Plan
    sweep_dir: RunDir
    confirm: int | None = None
    changed_inputs: bool = False


def start(source: str, overrides: Sequence[str], confirm: int | None = None) -> Session:
    """Check a recipe's sweep and make its directory.

    Raises UserError for anything wrong, and for a directory that exists.
    """
    plan = plans.build(adapter_start.compose(source, overrides))
    sweep_dir = run_dir_for(plan.recipe, source)
    _check_new(sweep_dir)
    session = _session(plan, sweep_dir, confirm)
    recipe = session.plan.recipe
    record = manifest.build(
        recipe,
        kind="sweep",
        name=sweep_dir.path.name,
        source=source,
        overrides=overrides,
        command=manifest.this_command(),
    )
    with sweep_dir.locked(RUNS_ALREADY):
        _check_new(sweep_dir)  # another process may have made it meanwhile
        sweep_dir.create(recipes.to_yaml(recipe), record)
    return session


def resume(
    directory: str | None,
    source: str | None,
    overrides: Sequence[str],
    confirm: int | None = None,
    *,
    changed_inputs: bool = False,
) -> Session:
    """Find a sweep by its directory, or by its recipe and `trainer.run_name`, to resume it.

    Raises UserError where the recipe is not the one that the sweep started with.
    """
    recipe = None if source is None else adapter_start.compose(source, overrides)
    sweep_dir = RunDir(directory) if directory else _directory_by_name(recipe, source)
    record = sweep_dir.sound_manifest()
    if record["kind"] != "sweep":
        raise UserError(
            f"this is the directory of a {record['kind']}",
            got=shown(sweep_dir.path),
            fix=f"{invocation('run')} --resume resumes a run",
        )
    stored = recipes.read(sweep_dir.recipe)
    if recipe is None:
        recipe = adapter_start.compose(sweep_dir.recipe, overrides)
    else:
        # This machine may have other GPUs or cores than the one where the sweep chose these.
        open_keys = [key for key in SETTLED if recipes.get(recipe, key) is None]
        recipe = recipes.with_values(recipe, {key: recipes.get(stored, key) for key in open_keys})
    _check_same(recipe, stored)
    session = _session(plans.build(recipe), sweep_dir, confirm)
    return replace(session, changed_inputs=changed_inputs)


def run(session: Session, server: Callable[[], type] | None = None) -> Study:
    """Run the trials that a sweep has left, and return its study.

    KeyboardInterrupt, also on SIGTERM, and a failure of the machine (MachineError) leave the sweep
    RUNNING. Other errors leave it FAILED, with the reason. It can be resumed in each case.

    Raises:
        UserError: another process is running the sweep, or its inputs changed, unless
            `session.changed_inputs`.
    """
    sweep_dir = session.sweep_dir
    with sweep_dir.locked(RUNS_ALREADY):
        study = Study(sweep_dir.journal, session.plan)
        study.outdated = trials.outdated_trials(sweep_dir)
        trials.reconcile(study, sweep_dir)
        new_confirm = session.confirm not in (None, study.num_to_confirm)
        if new_confirm or not study.finished:
            _check_inputs(session, study)
            study.outdated = trials.outdated_trials(sweep_dir)
        if session.confirm is not None:
            study.confirm_best(session.confirm)
        if study.finished:
            return study
        write_text(sweep_dir.recipe, recipes.to_yaml(session.plan.recipe))
        sweep_dir.move_to(Status.RUNNING)
        try:
            tune.run(sweep_dir, study, Progress(study), server)
        except Exception as error:
            sweep_dir.fail(error)
            if (machine := machine_error(error, writes=[sweep_dir.path])) is not None:
                again = f"{invocation('sweep')} --resume {shown(sweep_dir.path)}"
                raise MachineError(
                    f"the machine failed, not a trial, and the sweep has stopped: {machine.what}",
                    got=machine.got,
                    fix=f"{machine.fix}, then resume with: {again}; its trials resume from "
                    "their checkpoints",
                ) from error
            raise
        return study


def conclude(session: Session, study: Study, best: dict[str, Any] | None) -> None:
    """Write the sweep's final status and result to its manifest."""
    sweep_dir, counts = session.sweep_dir, study.counts()
    reason = study.stopped or (None if counts["COMPLETE"] else "no trial completed")
    status = Status.COMPLETE if reason is None else Status.FAILED
    result = {
        "counts": {name: counts[name] for name in ("COMPLETE", "PRUNED", "FAIL")},
        "best": best,
        "seconds": sweep_dir.read_manifest().get("seconds", 0.0),
    }
    if sweep_dir.status is not status:
        sweep_dir.move_to(status, reason=reason, result=result)


def _session(plan: Plan, sweep_dir: RunDir, confirm: int | None) -> Session:
    """Settle a sweep's recipe, and check that the machine can run its trials."""
    check_run(recipes.with_values(plan.recipe, {"sweep": None}))
    for path in plan.adapters:
        adapter_start.check(recipes.with_values(plan.recipe, {"sweep": None, KEY: path}))
    address = address_of(plan.recipe)
    sizes = (plan.sweep.max_concurrent, plan.sweep.pack_size)
    # A cluster is asked for its GPUs only where the packs depend on them.
    gpus: Gpus | None
    if address is not None and None in sizes and uses_gpus(plan.recipe):
        gpus = gpus_of(address)
    else:
        gpus = gpus_to_plan_for(plan.recipe, None)
    settled = sizing.settle(plan, gpus)
    _check_gpus(settled.recipe)
    for trial in sizing.largest_trials(settled):
        note_fit(trial, gpus)
    return Session(settled, sweep_dir, confirm)


def _check_gpus(recipe: Recipe) -> None:
    """Raise UserError where this machine has fewer GPUs than the packs need.

    A cluster's GPUs are for Ray to count.
    """
    packs = sizing.num_packs(recipe)
    needed, visible = sizing.gpus_per_pack(recipe) * packs, visible_gpus()
    if packs > 1 and needed > visible and address_of(recipe) is None:
        raise UserError(
            "not enough GPUs for sweep.max_concurrent",
            got=f"{needed} asked, {visible} there",
            fix="sweep.max_concurrent=null uses the GPUs that are there",
        )


def _directory_by_name(recipe: Recipe | None, source: str | None) -> RunDir:
    if recipe is None or source is None:
        raise UserError(
            "which sweep is to be resumed?", fix=f"{invocation('sweep')} --resume runs/NAME"
        )
    if recipe.trainer.run_name is None:
        root = Path(recipe.trainer.ckpt_path)
        known = sorted(str(file.parent) for file in root.glob("*/study.journal"))
        raise UserError(
            "which sweep of this recipe is to be resumed?",
            allowed=", ".join(known) or f"none in {root}",
            fix="name its directory after --resume",
        )
    return run_dir_for(recipe, source)


def _check_new(sweep_dir: RunDir) -> None:
    if sweep_dir.manifest.exists():
        raise UserError(
            "this directory exists",
            got=shown(sweep_dir.path),
            fix=f"add --resume {shown(sweep_dir.path)}, or choose another trainer.run_name",
        )


def _check_same(recipe: Recipe, stored: Recipe) -> None:
    new, old = dict(flatten(recipes.to_dict(recipe))), dict(flatten(recipes.to_dict(stored)))
    differ = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    changed = [key for key in differ if not key.startswith(exempt_from("sweep"))]
    if changed:
        raise UserError(
            "the recipe is not the one this sweep began with",
            got="; ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed),
            fix="undo the change, or start a new sweep under another trainer.run_name",
        )


def _check_inputs(session: Session, study: Study) -> None:
    """Raise UserError where the inputs changed; record the new ones where that is allowed."""
    changes = trials.changed_inputs(session.sweep_dir)
    if changes and study.finished:
        raise UserError(
            "the configurations to confirm were chosen on other inputs",
            got="; ".join(map(str, changes)),
            fix="put them back, or start a new sweep",
        )
    manifest.check_inputs(changes, "sweep", allowed=session.changed_inputs)
    if changes:
        trials.accept_inputs(session.sweep_dir)
        print(f"note: continuing with changed inputs: {'; '.join(map(str, changes))}", flush=True)
