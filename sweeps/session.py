"""A sweep from its first to its last trial, over as many processes as it takes: start, resume, run,
conclude.
"""

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
from rltrain.tools.fit import gpus_to_plan_for, note_fit
from rltrain.tools.preflight import check_run
from sweeps.execution import tune
from sweeps.study import plan as plans
from sweeps.study import trials
from sweeps.study.plan import Plan
from sweeps.study.progress import Progress
from sweeps.study.study import Study

# What a sweep chooses when it begins, where its recipe does not say.
SETTLED = ("trainer.num_threads", "sweep.max_concurrent", "sweep.pack_size")
RUNS_ALREADY = "another process is running this sweep"


@dataclass(frozen=True)
class Session:
    """A sweep ready to run: the plan of its settled recipe, and its directory."""

    plan: Plan
    sweep_dir: RunDir
    confirm: int | None = None
    """How many of the best configurations are to run again on fresh seeds; None: as many as asked
    for before.
    """
    changed_inputs: bool = False
    """Whether to go on although data, model or environment module are others than when the sweep
    began.
    """


def start(source: str, overrides: Sequence[str], confirm: int | None = None) -> Session:
    """A new sweep's directory; raises UserError for anything wrong, and for a directory that
    exists.
    """
    recipe = recipes.load(source, overrides)
    plan = plans.build(recipe)
    sweep_dir = run_dir_for(recipe, source)
    _check_new(sweep_dir)
    session = _session(recipe, plan, sweep_dir, confirm)
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
        _check_new(sweep_dir)  # another start may have made it meanwhile
        sweep_dir.create(recipes.to_yaml(recipe), record)
    return session


def _check_new(sweep_dir: RunDir) -> None:
    if sweep_dir.manifest.exists():
        raise UserError(
            "this directory exists",
            got=shown(sweep_dir.path),
            fix=f"go on with --resume {shown(sweep_dir.path)}, or choose another trainer.run_name",
        )


def resume(
    directory: str | None,
    source: str | None,
    overrides: Sequence[str],
    confirm: int | None = None,
    *,
    changed_inputs: bool = False,
) -> Session:
    """A sweep begun earlier, by its directory or by recipe and `trainer.run_name`; UserError if it
    is another now.
    """
    recipe = None if source is None else recipes.load(source, overrides)
    sweep_dir = RunDir(directory) if directory else _by_name(recipe, source)
    record = sweep_dir.sound_manifest()
    if record["kind"] != "sweep":
        raise UserError(
            f"this is the directory of a {record['kind']}",
            got=shown(sweep_dir.path),
            fix=f"{invocation('run')} --resume goes on with a run",
        )
    stored = recipes.read(sweep_dir.recipe)
    recipe = (
        recipes.load(sweep_dir.recipe, overrides) if recipe is None else _as_settled(recipe, stored)
    )
    _check_same(recipe, stored)
    session = _session(recipe, plans.build(recipe), sweep_dir, confirm)
    return replace(session, changed_inputs=changed_inputs)


def run(session: Session, server: Callable[[], type] | None = None) -> Study:
    """Run what the sweep has left; its study afterwards.

    Raises UserError when another process is at it, and for inputs that changed unless
    `session.changed_inputs`.

    KeyboardInterrupt, SIGTERM too, and a failure of the machine (MachineError) leave the sweep
    RUNNING; any other failure FAILED with the reason. All can be resumed.
    """
    sweep_dir = session.sweep_dir
    with sweep_dir.locked(RUNS_ALREADY):
        study = Study(sweep_dir.journal, session.plan)
        study.former = trials.on_former_inputs(sweep_dir)
        trials.reconcile(study, sweep_dir)
        more = session.confirm not in (None, study.num_to_confirm)
        if more or not study.finished:
            _check_inputs(session, study)
            study.former = trials.on_former_inputs(sweep_dir)
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
                    fix=f"{machine.fix}, then go on with: {again}; its trials go on from "
                    "their checkpoints",
                ) from error
            raise
        return study


def conclude(session: Session, study: Study, best: dict[str, Any] | None) -> None:
    """Write the sweep's final status and result."""
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


def _session(recipe: Recipe, plan: Plan, sweep_dir: RunDir, confirm: int | None) -> Session:
    check_run(recipes.with_values(recipe, {"sweep": None}))
    gpus = _gpus(recipe)
    settled = Plan(trials.settle(recipe, gpus), plan.space, plan.first_trials)
    _check_places(settled.recipe)
    for one in trials.largest(settled):
        note_fit(one, gpus)
    return Session(settled, sweep_dir, confirm)


def _gpus(recipe: Recipe) -> Gpus | None:
    """The GPUs to plan for; a cluster is asked for its own where the recipe leaves the packs to
    them.
    """
    assert recipe.sweep is not None
    address, sizes = address_of(recipe), (recipe.sweep.max_concurrent, recipe.sweep.pack_size)
    if address is None or None not in sizes or not uses_gpus(recipe):
        return gpus_to_plan_for(recipe, None)
    return gpus_of(address)


def _check_places(recipe: Recipe) -> None:
    """Places must each have their GPUs; a cluster's are for Ray to count."""
    packs = trials.packs_at_once(recipe)
    wanted, there = trials.gpus_per_place(recipe) * packs, visible_gpus()
    if packs > 1 and wanted > there and address_of(recipe) is None:
        raise UserError(
            "not enough GPUs for sweep.max_concurrent",
            got=f"{wanted} asked, {there} there",
            fix="sweep.max_concurrent=null takes those that are there",
        )


def _by_name(recipe: Recipe | None, source: str | None) -> RunDir:
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


def _as_settled(recipe: Recipe, stored: Recipe) -> Recipe:
    """A recipe file's recipe with what the sweep settled when it began: this machine may have
    others to give.
    """
    open_keys = [key for key in SETTLED if recipes.get(recipe, key) is None]
    return recipes.with_values(recipe, {key: recipes.get(stored, key) for key in open_keys})


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
    """Refuse inputs that changed since the sweep began, or record the new ones and say what they
    are.
    """
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
        print(f"note: going on with changed inputs: {'; '.join(map(str, changes))}", flush=True)
