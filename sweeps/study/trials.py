"""A sweep's trials as runs: their recipes and directories, and their recovery after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from harness.config import recipe as recipes
from harness.config.digest import PLACE_KEYS
from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.records import manifest
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from rltrain.models.adapter_start import with_adapter
from sweeps.study.plan import Plan
from sweeps.study.sizing import engine_rank
from sweeps.study.study import Study, Trial

_ENDED = (Status.COMPLETE, Status.PRUNED, Status.FAILED)
_FINAL = {TrialState.PRUNED: Status.PRUNED, TrialState.FAIL: Status.FAILED}


def create(plan: Plan, trial: Trial, sweep_dir: RunDir) -> tuple[RunDir, Recipe]:
    """Make a trial's directory, with recipe and manifest; return it and the recipe.

    A directory that an earlier process made is left as it is. Raises UserError when it is another
    trial's.
    """
    run_dir = sweep_dir.trial(trial.number)
    if run_dir.manifest.exists():
        _check_same(trial, run_dir)
        return run_dir, recipes.read(run_dir.recipe)
    recipe, sweep = trial_recipe(plan, trial, sweep_dir), sweep_dir.read_manifest()
    record = manifest.build(
        recipe,
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
    run_dir.create(recipes.to_yaml(recipe), record)
    return run_dir, recipe


def trial_recipe(plan: Plan, trial: Trial, sweep_dir: RunDir) -> Recipe:
    """Return a trial's recipe, from the sweep's settled one."""
    path = sweep_dir.trial(trial.number).path
    values = {
        "sweep": None,
        "trainer.ckpt_path": str(path.parent),
        "trainer.run_name": path.name,
        "trainer.resume_mode": "latest",
    }
    return with_adapter(plan.recipe, values | _trial_values(plan, trial))


def rerun_overrides(plan: Plan, trial: Trial, sweep_overrides: Sequence[str]) -> list[str]:
    """Return the overrides with which `harness.run` makes a trial's recipe from the sweep's file.

    `sweep_overrides` are the overrides that the sweep was started with.
    """
    values = _trial_values(plan, trial)
    dropped = {"sweep", "trainer.seed", *PLACE_KEYS, *values}
    kept = []
    for override in sweep_overrides:
        key = override.split("=", 1)[0]
        if key not in dropped and not key.startswith("sweep."):
            kept.append(override)
    return kept + [recipes.override_for(key, value) for key, value in values.items()]


def _trial_values(plan: Plan, trial: Trial) -> dict[str, Any]:
    """Return a trial's parameters and seed, by key, and the values that all trials share."""
    shared = {
        "generator.max_lora_rank": engine_rank(plan),
        "trainer.num_threads": plan.recipe.trainer.num_threads,
    }
    return {
        **{key: value for key, value in shared.items() if value is not None},
        **trial.params,
        "seed": trial.seed,
    }


def changed_inputs(sweep_dir: RunDir) -> list[manifest.Difference]:
    """Return how the inputs of a sweep and its trials differ from those that they recorded.

    Trials on earlier versions of the sweep's inputs are not compared.
    """
    sweep = sweep_dir.read_manifest()
    version = manifest.versions(sweep)[-1]
    records = [run_dir.read_manifest() for run_dir in _directories(sweep_dir)]
    latest = [record for record in records if manifest.versions(record)[-1] == version]
    changes = (change for record in (sweep, *latest) for change in manifest.changed_inputs(record))
    return list(dict.fromkeys(changes))


def accept_inputs(sweep_dir: RunDir) -> None:
    """Record the current inputs in the manifests of a sweep and of its trials that continue.

    A trial that has ended keeps its record, unless none of its own inputs changed.
    """
    version = manifest.versions(sweep_dir.read_manifest())[-1]
    for run_dir in _directories(sweep_dir):
        record = run_dir.read_manifest()
        ended = run_dir.status in _ENDED and bool(manifest.changed_inputs(record))
        if not ended and manifest.versions(record)[-1] >= version:
            manifest.accept_inputs(run_dir, version + 1)
    # Last: after a kill before this line, the sweep still has its old inputs, and asks again.
    manifest.accept_inputs(sweep_dir, version + 1)


def outdated_trials(sweep_dir: RunDir) -> frozenset[int]:
    """Return the trials that were trained, wholly or in part, on earlier inputs of the sweep."""
    current = manifest.versions(sweep_dir.read_manifest())[-1:]
    return frozenset(
        int(run_dir.path.name)
        for run_dir in _directories(sweep_dir)
        if manifest.versions(run_dir.read_manifest()) != current
    )


def _directories(sweep_dir: RunDir) -> list[RunDir]:
    """Return the directories of the sweep's trials that have a manifest, by number."""
    names = (file.parent.name for file in sorted(sweep_dir.trials.glob("*/manifest.json")))
    return [sweep_dir.trial(int(name)) for name in names if name.isdigit()]


def last_step(run_dir: RunDir) -> int:
    """Return the last step that a run logged; 0 where it logged none, or its log is damaged."""
    log = MetricsFile(run_dir.metrics)
    rows = log.rows() if log.damage() is None else []
    return int(rows[-1]["step"]) if rows else 0


def final_value(run_dir: RunDir, metric: str) -> tuple[float | None, int]:
    """Return the last value that a run logged of a metric, or None, and the run's last step."""
    rows = MetricsFile(run_dir.metrics).rows()
    values = [row[metric] for row in rows if metric in row]
    return (values[-1] if values else None), int(rows[-1]["step"]) if rows else 0


def reconcile(study: Study, sweep_dir: RunDir) -> None:
    """Make the study and the trials' manifests agree after a kill.

    The study learns how runs ended, and manifests what the study decided. Raises UserError when
    the directories show that the journal has lost trials.
    """
    sweep_dir.tidy()
    _check_none_lost(len(study.trials()), sweep_dir)
    for record in study.trials():
        run_dir = sweep_dir.trial(record.number)
        if not run_dir.manifest.exists():
            continue
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
    """Report what a killed trial logged: it does not repeat evaluations before its checkpoint.

    The trial repairs a damaged log itself when it resumes.
    """
    metric, log = study.plan.sweep.metric, MetricsFile(run_dir.metrics)
    for row in log.rows() if log.damage() is None else ():
        step = int(row["step"])
        if metric in row and step > 0 and step not in record.intermediate_values:
            reason = study.report(record.number, step, row[metric])
            if reason is not None:
                run_dir.move_to(Status.PRUNED, reason=reason)
                return


def _check_same(trial: Trial, run_dir: RunDir) -> None:
    """Raise UserError unless a directory is this trial's: a journal with lost lines may differ."""
    recorded = run_dir.sound_manifest()["trial"]
    asked = {"seed": trial.seed, "params": trial.params}
    differ = [
        key
        for key, value in asked.items()
        if not isinstance(recorded, dict) or recorded.get(key) != value
    ]
    if differ:
        raise _lost_lines(run_dir, f"its {' and '.join(differ)} differ from what the study asks")


def _check_none_lost(num_known: int, sweep_dir: RunDir) -> None:
    """Raise UserError where directories show trials that the study does not know.

    A trial is in the journal before its directory is made, so a kill can only have cut off the
    last line.
    """
    folders = sweep_dir.trials.iterdir() if sweep_dir.trials.is_dir() else ()
    for number in sorted(int(folder.name) for folder in folders if folder.name.isdigit()):
        run_dir = sweep_dir.trial(number)
        if number > num_known or (
            number == num_known and run_dir.manifest.exists() and run_dir.status in _ENDED
        ):
            raise _lost_lines(run_dir, "the study has no such trial")


def _lost_lines(run_dir: RunDir, problem: str) -> UserError:
    return UserError(
        "the study's journal has lost lines",
        got=f"{run_dir.path}: {problem}",
        fix="put a copy of study.journal back; nothing was changed",
    )
