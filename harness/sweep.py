"""`python -m harness.sweep RECIPE`: run every trial of a recipe's sweep, and write its report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import recipe as recipes
from harness.core.cli import GPU_MEMORY, Parser, invocation, run_command
from harness.core.errors import UserError
from harness.core.paths import RECIPES, shown
from harness.records.run_dir import RunDir
from harness.run import clear_launch

if TYPE_CHECKING:
    import pandas as pd

    from analysis.experiment import Experiment
    from sweeps.session import Session
    from sweeps.study.study import Study


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 0 when a trial completed, 1 when none did."""
    options = parse(argv)
    if options.dry_run:
        return _dry_run(options)
    if options.gpu_memory is not None:
        raise UserError(
            "--gpu-memory is for --dry-run: a sweep takes the GPUs that it finds",
            got=options.gpu_memory,
        )
    from sweeps import session as sessions

    if options.resume is None:
        session = sessions.start(_recipe(options), options.overrides, options.confirm)
    else:
        session = sessions.resume(
            options.resume or None,
            options.recipe,
            options.overrides,
            options.confirm,
            changed_inputs=options.changed_inputs,
        )
    return _run(session, new=options.resume is None)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments, which come in any order.

    `resume` is None, a directory, or "" for the directory that the recipe names.
    """
    parser = Parser(
        prog=invocation("sweep"),
        description="Run the sweep of a recipe: sweep.space, over sweep.seeds.",
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="RECIPE key=value",
        help="e.g. recipes/quickstart.yaml sweep.num_trials=24",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the space, the first trials and the cost"
    )
    parser.add_argument("--gpu-memory", metavar="GIB", help=f"with --dry-run: {GPU_MEMORY}")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="resume the sweep in this directory",
    )
    parser.add_argument(
        "--changed-inputs",
        action="store_true",
        help="with --resume: continue although data, model or "
        "environment module changed; the report marks which trials were trained on which",
    )
    parser.add_argument(
        "--confirm", type=int, metavar="K", help="at the end run the K best again, on fresh seeds"
    )
    options = parser.parse_intermixed_args(argv)
    if options.confirm is not None and options.confirm < 1:
        raise UserError(
            "--confirm is the number of best configurations to run again",
            got=options.confirm,
            allowed=">= 1",
        )
    if options.changed_inputs and options.resume is None:
        raise UserError("--changed-inputs is for --resume: a new sweep has no earlier inputs")
    words = list(options.arguments)
    # argparse gives `--resume` the next word, also when that is a recipe or an override.
    if (word := options.resume) and not Path(word).is_dir():
        recipe = word.endswith((".yaml", ".yml")) or (RECIPES / f"{word}.yaml").is_file()
        if recipe or "=" in word:
            words.insert(0, word)
            options.resume = ""
    sources = [word for word in words if "=" not in word]
    options.overrides = [word for word in words if "=" in word]
    if len(sources) > 1:
        raise UserError(
            "one recipe at a time", got=" ".join(sources), allowed="RECIPE and key=value overrides"
        )
    options.recipe = sources[0] if sources else None
    return options


def _recipe(options: argparse.Namespace) -> str:
    if options.recipe is None:
        raise UserError("no recipe was given", fix=f"{invocation('sweep')} recipes/quickstart.yaml")
    return str(options.recipe)


def _dry_run(options: argparse.Namespace) -> int:
    from rltrain.models import adapter_start
    from rltrain.tools.fit import gpus_to_plan_for
    from sweeps import dry_run
    from sweeps.study import plan

    if options.resume is not None:
        raise UserError(
            "--dry-run shows a sweep before it starts",
            got="--resume",
            fix="leave out one of the two",
        )
    source = _recipe(options)
    recipe = adapter_start.compose(source, options.overrides)
    gpus = gpus_to_plan_for(recipe, options.gpu_memory)
    if options.gpu_memory is not None:
        recipe = recipes.with_values(recipe, {"trainer.placement.device": "cuda"})
    planned = plan.build(recipe)
    print(dry_run.describe(planned, source, gpus, confirm=options.confirm or 0))
    for note in dry_run.notes(recipe, options.overrides):
        print(note)
    dry_run.check_fits(planned, gpus)
    return 0


def _run(session: Session, *, new: bool) -> int:
    from sweeps import session as sessions
    from sweeps.study.sizing import describe_slots

    place = shown(session.sweep_dir.path)
    for note in recipes.engine_notes(session.plan.recipe):
        print(f"note: {note}")
    again = f", then the best {session.confirm} again on fresh seeds" if session.confirm else ""
    slots = describe_slots(session.plan.recipe)
    print(f"sweep {place}: {session.plan.num_runs} runs{again}, {slots}", flush=True)
    try:
        study = sessions.run(session)
    except KeyboardInterrupt:
        print(f"stopped; resume with: {invocation('sweep')} --resume {place}", file=sys.stderr)
        raise
    except UserError:
        if new:
            clear_launch(session.sweep_dir)
        raise
    if study.exhausted:
        print(
            f"the space is exhausted after {len(study.search_trials())} runs: sweep.num_trials "
            "asks for more"
        )
    return _finish(session, study, place)


def _finish(session: Session, study: Study, place: str) -> int:
    """Write results and report, and print the best configuration and how to run it again."""
    from analysis.data.tables import write_results
    from analysis.experiment import Experiment
    from analysis.report.write import report_folder, write
    from sweeps.session import conclude

    experiment = Experiment.open(session.sweep_dir.path)
    trial = experiment.best_trial()
    conclude(session, study, _best(experiment, trial))
    # The trials are read once, before their best is in the manifest.
    experiment = experiment.with_manifest(session.sweep_dir.read_manifest())
    write_results(session.sweep_dir.path, experiment.trials)
    folder = report_folder(session.sweep_dir.path)
    report = write([experiment], folder, processes=os.cpu_count() or 1)
    print(report.answer)
    if trial is not None:
        print(f"again: {experiment.command(str(trial['run_dir']))}")
    counts = study.counts()
    if study.stopped:
        print(f"stopped: {study.stopped}; resume with: {invocation('sweep')} --resume {place}")
    print(
        f"{counts['COMPLETE']} complete, {counts['PRUNED']} pruned, {counts['FAIL']} "
        f"failed  {place}"
    )
    print(f"report: {place}/report/index.html")
    return 0 if counts["COMPLETE"] and not study.stopped else 1


def _best(experiment: Experiment, trial: pd.Series | None) -> dict[str, Any] | None:
    """Return the best configuration for the sweep's manifest."""
    best = experiment.best
    if best is None or trial is None:
        return None
    number = int(trial["number"])
    params = RunDir(experiment.directory).trial(number).read_manifest()["trial"]["params"]
    return {
        "configuration": best.configuration,
        "params": params,
        "metric": experiment.metric,
        "mean": best.score,
        "seeds": best.seeds,
        "trial": number,
    }


if __name__ == "__main__":
    run_command(main)
