"""`python -m harness.run RECIPE [overrides]`: one training run, its directory, progress
and result.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from harness.config import metrics
from harness.config import recipe as recipes
from harness.config.digest import exempt_from, is_recipe_digest
from harness.config.expect import judge
from harness.config.schema import Logger, Recipe
from harness.config.validate import num_processes
from harness.core.cli import GPU_MEMORY, Parser, invocation, run_command
from harness.core.errors import UserError
from harness.core.locks import held
from harness.core.paths import shown
from harness.loggers.loggers import Loggers
from harness.loggers.wandb import wandb_mode
from harness.records import manifest, rerun
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status, run_dir_for

MOVABLE = exempt_from("run")
SAME_RECIPE = exempt_from("expectations")
UNMET = 3
# What a launch leaves that ended before its first step.
LAUNCHED = {"recipe.yaml", "manifest.json", ".lock", "log.txt", "tensorboard", "wandb", "packs"}
LAUNCHED |= {"study.journal", "study.journal.lock"}


def main(argv: list[str]) -> int:
    """Parse, check, train and print the result; return the exit status."""
    parser = Parser(prog=invocation("run"), description="Train one run of a recipe.")
    parser.add_argument("recipe", nargs="?", help="a recipe, e.g. recipes/quickstart.yaml")
    parser.add_argument(
        "overrides", nargs="*", help="key=value, e.g. trainer.policy.model.lora.rank=8"
    )
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="resume the run in this directory; its placement may be overridden",
    )
    parser.add_argument(
        "--from",
        dest="taken",
        metavar="DIR",
        help="a new run with the recipe of the run in this directory",
    )
    parser.add_argument(
        "--changed-inputs",
        action="store_true",
        help="with --resume: continue although data, model or "
        "environment module changed; manifest and report say so",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be trained, where, and the cost"
    )
    parser.add_argument("--gpu-memory", metavar="GIB", help=f"with --dry-run: {GPU_MEMORY}")
    parser.add_argument(
        "--check",
        action="store_true",
        help="judge the recipe's expectations, overridden or not; exit with 3 if unmet",
    )
    options = parser.parse_intermixed_args(argv)
    options.name = options.recipe
    if options.taken:
        _use_recipe_of_run(options)
    if options.dry_run:
        return _dry_run(options)
    if options.gpu_memory is not None:
        raise UserError(
            "--gpu-memory is for --dry-run: a run takes the GPUs that are there",
            got=options.gpu_memory,
        )
    recipe, run_dir = _prepare_resume(options) if options.resume else _prepare_start(options)
    try:
        met = _train_and_judge(recipe, run_dir, options)
    except UserError:
        if options.resume is None:
            clear_launch(run_dir)
        raise
    print(_summary(run_dir))
    return 0 if met or not options.check else UNMET


def _train_and_judge(recipe: Recipe, run_dir: RunDir, options: argparse.Namespace) -> bool:
    """Train what is left of the run, its directory locked; return whether it is as expected."""
    with run_dir.locked("another process is training this run"):
        if options.resume:
            # Again, now that it is locked: another process may have finished it meanwhile.
            _check_same(recipes.read(run_dir.recipe), run_dir, options.changed_inputs)
        else:
            _create(recipe, run_dir, options)
        if _only_lacks_verdict(run_dir.sound_manifest()):
            # A kill may have kept the last step from the loggers.
            print(f"run {shown(run_dir.path)} is trained; its verdict was not written")
            row = MetricsFile(run_dir.metrics).rows()[-1]
            with contextlib.closing(Loggers(recipe, run_dir)) as loggers:
                loggers.report(int(row["step"]), row)
        else:
            _train(recipe, run_dir, changed_inputs=options.changed_inputs)
        return _judge(recipe, run_dir, options.check)


def _use_recipe_of_run(options: argparse.Namespace) -> None:
    """Replace the recipe file of `options` by the recipe of the run that `--from` names."""
    words = [word for word in (options.recipe, *options.overrides) if word is not None]
    others = (
        ["--resume"] if options.resume is not None else [word for word in words if "=" not in word]
    )
    if others:
        raise UserError(
            "--from takes its recipe from a run",
            got=" ".join(others),
            allowed="key=value overrides",
        )
    options.recipe, fresh, options.name = rerun.new_run_from(options.taken)
    options.overrides = [*fresh, *words]


def _prepare_start(options: argparse.Namespace) -> tuple[Recipe, RunDir]:
    """Return the recipe of a new run and its directory, which is not created yet."""
    recipe = _composed(options)
    _print_notes(recipe, options.overrides)
    cores = (os.cpu_count() or 1) // num_processes(recipe)
    recipe.trainer.num_threads = recipe.trainer.num_threads or max(1, cores)
    _check(recipe)
    run_dir = run_dir_for(recipe, options.name)
    if run_dir.manifest.exists():
        _check_same(recipe, run_dir, options.changed_inputs)
    return recipe, run_dir


def _create(recipe: Recipe, run_dir: RunDir, options: argparse.Namespace) -> None:
    """Create the run's directory; check it where another start has just created it."""
    if run_dir.manifest.exists():
        _check_same(recipe, run_dir, options.changed_inputs)
        if recipe.trainer.max_tokens_per_microbatch == "auto":
            stored = recipes.read(run_dir.recipe)
            recipe.trainer.max_tokens_per_microbatch = stored.trainer.max_tokens_per_microbatch
    else:
        if options.changed_inputs:
            raise UserError(
                "--changed-inputs is for --resume: a new run has none that could have changed"
            )
        record = manifest.build(
            recipe,
            kind="run",
            name=run_dir.path.name,
            source=str(options.recipe),
            overrides=options.overrides,
            command=manifest.this_command(),
        )
        run_dir.create(recipes.to_yaml(recipe), record)


def _composed(options: argparse.Namespace) -> Recipe:
    if options.recipe is None:
        raise UserError("no recipe was given", fix=f"{invocation('run')} recipes/quickstart.yaml")
    from rltrain.models import adapter_start

    recipe = adapter_start.compose(options.recipe, options.overrides, sweeps=False)
    recipe.sweep = None
    return recipe


def _dry_run(options: argparse.Namespace) -> int:
    from rltrain.tools.fit import check_fit, gpus_to_plan_for
    from sweeps.dry_run import describe_run

    if options.resume is not None:
        raise UserError(
            "--dry-run shows a run before it starts", got="--resume", fix="leave out one of the two"
        )
    recipe = _composed(options)
    gpus = gpus_to_plan_for(recipe, options.gpu_memory)
    print(describe_run(recipe, options.recipe, gpus))
    _print_notes(recipe, options.overrides)
    check_fit(recipe, gpus)
    return 0


def _print_notes(recipe: Recipe, overrides: list[str]) -> None:
    from sweeps.dry_run import notes

    for note in notes(recipe, overrides):
        print(note)


def _prepare_resume(options: argparse.Namespace) -> tuple[Recipe, RunDir]:
    """Return the recipe and the directory of a run that is resumed."""
    from rltrain.models import adapter_start

    run_dir = RunDir(options.resume)
    words = [word for word in (options.recipe, *options.overrides) if word is not None]
    refused = [word for word in words if not word.startswith(MOVABLE) or "=" not in word]
    if refused:
        raise UserError(
            "--resume takes its recipe from the run directory; only where and how it "
            "computes may change",
            got=" ".join(refused),
            allowed=", ".join(f"{key}*" if key.endswith((".", "_")) else key for key in MOVABLE),
            fix=f"{invocation('run')} --resume {run_dir.path}",
        )
    run_dir.sound_manifest()
    recipe = recipes.read(run_dir.recipe)
    _check_same(recipe, run_dir, options.changed_inputs)
    recipe = recipes.with_overrides(recipe, words)
    _check(adapter_start.with_copy(recipe, run_dir))
    return recipe, run_dir


def _check(recipe: Recipe) -> None:
    from rltrain.tools.fit import gpus_to_plan_for, note_fit
    from rltrain.tools.preflight import check_run

    check_run(recipe)
    note_fit(recipe, gpus_to_plan_for(recipe, None))
    if Logger.wandb in recipe.trainer.logger:
        wandb_mode()


def _check_same(recipe: Recipe, run_dir: RunDir, changed_inputs: bool) -> None:
    """Raise UserError unless a directory holds an unfinished run of this recipe and its inputs."""
    record = run_dir.sound_manifest()
    if record["kind"] == "sweep":
        raise UserError(
            "this directory holds a sweep", got=run_dir.path, fix="choose another trainer.run_name"
        )
    if record["kind"] == "trial":
        raise UserError(
            "this directory holds a trial of a sweep, whose journal would not hear of it",
            got=run_dir.path,
            fix=f"{invocation('sweep')} --resume {shown(run_dir.path.parents[1])}, or a "
            "run of its own: "
            f"{invocation('run')} --from {shown(run_dir.path)}",
        )
    same = is_recipe_digest(record["recipe"]["digest"], recipe)
    if record["status"] in (Status.COMPLETE.value, Status.PRUNED.value) and not (
        same and _only_lacks_verdict(record)
    ):
        raise UserError(
            f"this run is {record['status']} already",
            got=run_dir.path,
            fix="choose another trainer.run_name to run it again",
        )
    if not same:
        raise UserError(
            "this directory holds an unfinished run of another recipe",
            got=run_dir.path,
            fix="choose another trainer.run_name",
        )
    if not _only_lacks_verdict(record):
        manifest.check_inputs(manifest.changed_inputs(record), "run", allowed=changed_inputs)


def _only_lacks_verdict(record: dict[str, Any]) -> bool:
    """Return whether a run was killed between its last step and its verdict.

    Trials and reproductions never get a verdict.
    """
    ended = record["kind"] == "run" and record["status"] == Status.COMPLETE.value
    return ended and not {"expect", "reproduces"} & record.keys()


def _train(recipe: Recipe, run_dir: RunDir, *, changed_inputs: bool) -> None:
    path = shown(run_dir.path)
    if changed_inputs and (changes := manifest.accept_inputs(run_dir)):
        print(f"note: continuing with changed inputs: {'; '.join(changes)}")
    record = run_dir.read_manifest()
    if record["status"] != Status.CREATED.value:
        run_dir.update(resumed=[*record.get("resumed", []), manifest.resumption(record, recipe)])
    print(f"run {path}", flush=True)
    try:
        with contextlib.closing(Loggers(recipe, run_dir)) as loggers:
            print("loading the model and starting the engine ...", flush=True)
            from rltrain.distributed.process import quiet_libraries

            quiet_libraries()
            from rltrain.worker_group import train_run

            for report in train_run(recipe, run_dir):
                loggers.report(report.total_steps, report.metrics)
    except KeyboardInterrupt:
        print(f"stopped; resume with: {invocation('run')} --resume {path}", file=sys.stderr)
        raise


def clear_launch(run_dir: RunDir) -> None:
    """Remove the directory of a run that bad input ended before its first step."""
    if not run_dir.path.is_dir():
        return
    with held(run_dir.path / ".lock") as locked:
        if locked and set(os.listdir(run_dir.path)) <= LAUNCHED:
            shutil.rmtree(run_dir.path)


def _judge(recipe: Recipe, run_dir: RunDir, forced: bool) -> bool:
    """Judge the recipe's expectations by this run, print and record the verdicts.

    With overrides the recipe is another experiment: it is judged only if that is `forced`, or if
    the expectations were overridden too. Returns whether all are met.
    """
    others = [] if forced else overridden(run_dir)
    if any(word.startswith("expect") for word in others):
        others = []
    verdicts = judge({} if others else recipe.expect, [MetricsFile(run_dir.metrics).rows()])
    run_dir.update(expect=[verdict.record() for verdict in verdicts])
    for verdict in verdicts:
        print(verdict)
    if others and recipe.expect:
        print(
            "what the recipe expects is not judged: it was overridden "
            f"({', '.join(others)}); --check judges it"
        )
    return all(verdict.met for verdict in verdicts)


def overridden(run_dir: RunDir) -> list[str]:
    """Return the overrides that make a run another experiment than its recipe file.

    Those of the run whose recipe it was started from count too.
    """
    record = run_dir.read_manifest()["recipe"]
    words = [word for word in record.get("overrides") or () if not word.startswith(SAME_RECIPE)]
    file = Path(record["source"])
    origin = RunDir(file.parent)
    has_origin = (
        file.name == origin.recipe.name and origin.manifest.exists() and origin.path != run_dir.path
    )
    return words + (overridden(origin) if has_origin else [])


def _summary(run_dir: RunDir) -> str:
    record = run_dir.read_manifest()
    result, before = record["result"], "start" if record.get("adapter") else "base"
    base = f" ({before} {result['base']['eval/accuracy']:.3f})" if result["base"] else ""
    return (
        f"held-out accuracy {result['metrics']['eval/accuracy']:.3f}{base} after "
        f"{result['step']} steps in {metrics.duration(result['seconds'])}  {shown(run_dir.path)}"
    )


if __name__ == "__main__":
    run_command(main)
