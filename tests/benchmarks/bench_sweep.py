"""Makespans of sweeps of 8 and 16 trials of mixed rank, alpha, learning rate and targets.

A makespan is the seconds from command to last result. TRL trains one process a trial. Ours is one
`python -m harness.sweep`: each trial alone in its process, packed on one base and engine, or packed
with a pruner. TRL's variants are tried in the first round of the first size, and the fastest is
kept. Ours keep each core busy with a process of one thread, which was faster than one process with
two threads whenever it was tried.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from harness.config import recipe as recipes
from harness.core.paths import PROJECT, RECIPES
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from tests.benchmarks.side_by_side import (
    create_environment,
    middle,
    on_record,
    origin,
    result,
    write_record,
)
from tests.benchmarks.task import task_of
from tests.benchmarks.trl_run import PACKAGES

CORES = 2
ROUNDS = 3
SIZES = (8, 16)
MEMBERS = (
    4  # of a pack at a time: more gain nothing with this engine, and each has a process of Tune's
)
STEPS, EVERY = 24, 8  # with a pruner, an evaluation every so many steps
COMPLETIONS = 128
SCORED_SAMPLES = 4  # of each held-out problem, for the best trial of each contender
PRUNER = {"name": "successive_halving", "min_resource": EVERY, "reduction_factor": 4}
ENGINE = "transformers"
PARTS = ("rollout", "logprobs", "update", "sync", "checkpoint", "eval")

RANK, ALPHA = "trainer.policy.model.lora.rank", "trainer.policy.model.lora.alpha"
RATE, TARGETS = "trainer.policy.optimizer_config.lr", "trainer.target_modules"
LENGTH = "trainer.max_steps"
CONFIGURATIONS = [
    (8, 32, 1e-3, "all-linear"),
    (1, 32, 1e-3, "all-linear"),
    (16, 16, 3e-4, "attention"),
    (4, 32, 2e-3, "mlp"),
    (32, 32, 5e-4, "all-linear"),
    (8, 16, 1e-4, "mlp"),
    (2, 16, 3e-3, "attention"),
    (16, 32, 1e-3, "mlp"),
    (4, 16, 1e-3, "all-linear"),
    (32, 16, 2e-3, "mlp"),
    (1, 16, 5e-4, "attention"),
    (8, 32, 3e-3, "all-linear"),
    (2, 32, 1e-3, "mlp"),
    (16, 32, 3e-4, "all-linear"),
    (4, 32, 5e-4, "attention"),
    (32, 32, 1e-3, "mlp"),
]
MODULES = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}

Variants = dict[str, Callable[[int, Path], dict[str, Any]]]


def main() -> None:
    """Measure, print, and write `docs/benchmarks/sweep.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument(
        "--contenders",
        nargs="*",
        choices=list(contenders(Path())),
        default=list(contenders(Path())),
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        trl = create_environment(root / "trl", PACKAGES)
        chosen = {
            name: variants
            for name, variants in contenders(trl, options.steps).items()
            if name in options.contenders
        }
        # A size that is not measured now keeps its record, with the machine and commit it was
        # measured on.
        sizes: dict[str, Any] = on_record("sweep").get("sizes", {})
        for size in options.sizes:
            sizes[str(size)] = measure(size, chosen, options.rounds, root)
            chosen = {
                name: {one["way"]: chosen[name][one["way"]]}
                for name, one in sizes[str(size)].items()
            }
            write_record(
                "sweep",
                __doc__,
                rounds=options.rounds,
                steps=options.steps,
                completions=COMPLETIONS,
                pruner=PRUNER,
                engine=ENGINE,
                configurations=CONFIGURATIONS,
                sizes=sizes,
            )


def contenders(trl: Path, steps: int = STEPS) -> dict[str, Variants]:
    """Return each contender's variants of a sweep: functions of number of trials and folder."""
    busy = [f"sweep.max_concurrent={CORES}", "trainer.num_threads=1"]
    pruned = [f"trainer.eval_interval={EVERY}", recipes.override_for("sweep.pruner", PRUNER)]

    def theirs(together: int) -> Callable[[int, Path], dict[str, Any]]:
        return lambda size, root: their_sweep(size, root, together, trl, steps)

    def ours(*overrides: str, packs: bool) -> Variants:
        """Return a variant with a pack of several trials for each core, or without packs."""
        way = "a pack of 1 thread for each core" if packs else "two at a time, 1 thread"

        def run(size: int, root: Path) -> dict[str, Any]:
            members = min(MEMBERS, -(-size // CORES)) if packs else 1
            return our_sweep(size, root, [*busy, *overrides, f"sweep.pack_size={members}"], steps)

        return {way: run}

    return {
        "TRL": {"one at a time, 2 threads": theirs(1), "two at a time, 1 thread": theirs(2)},
        "ours, unpacked": ours(packs=False),
        "ours, packed": ours(packs=True),
        "ours, packed and pruned": ours(*pruned, packs=True),
    }


def measure(size: int, chosen: dict[str, Variants], rounds: int, root: Path) -> dict[str, Any]:
    """Return alternating rounds of every contender at one number of trials.

    One evaluation scores the best trial of each.
    """
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    best_way: dict[str, str] = {}
    for turn in range(rounds):
        for name, variants in chosen.items():
            rows = []
            for way in [best_way[name]] if turn else variants:
                folder = root / f"{size}_{turn}_{name}_{way}".replace(" ", "_").replace(",", "")
                folder.mkdir()
                rows.append({"way": way, **variants[way](size, folder)})
                print(
                    f"{size:>3} trials  {name}, {way}: {rows[-1]['makespan_s']:.1f} s, "
                    f"best {rows[-1]['best']}",
                    flush=True,
                )
            fastest = min(rows, key=lambda row: float(row["makespan_s"]))
            best_way[name] = fastest["way"]
            measured[name].append(
                {**fastest, "tried_s": {row["way"]: row["makespan_s"] for row in rows}}
            )
    adapters = [{"folder": rows[0]["best_adapter"]} for rows in measured.values()]
    scored = result(
        "score_adapters",
        {"recipe": "quickstart", "adapters": adapters, "samples": SCORED_SAMPLES},
        threads=CORES,
    )["accuracy"]
    for rows in measured.values():
        for row in rows:
            del row["best_adapter"]
    return {
        name: {
            "way": best_way[name],
            "makespan_s": middle((row["makespan_s"] for row in rows), 2),
            "rounds": rows,
            "best_accuracy": accuracy,
            **origin(),
            "parts_s": {
                part: middle((row["parts_s"][part] for row in rows), 2)
                for part in rows[0]["parts_s"]
            },
        }
        for (name, rows), accuracy in zip(measured.items(), scored, strict=True)
    }


def their_sweep(size: int, root: Path, together: int, trl: Path, steps: int) -> dict[str, Any]:
    """Train each trial by TRL in a fresh process, several at a time; each evaluates at its end."""

    def trial(number: int) -> dict[str, Any]:
        rank, alpha, lr, targets = CONFIGURATIONS[number]
        spec = {
            "task": task_of("quickstart"),
            "completions": COMPLETIONS,
            "per_device": COMPLETIONS,
            "steps": steps,
            "seed": 0,
            "lr": lr,
            "rank": rank,
            "alpha": alpha,
            "targets": MODULES.get(targets, targets),
            "output": str(root / f"{number}"),
            "evaluate": str(root / f"adapter{number}"),
        }
        return result("trl_run", spec, threads=CORES // together, python=trl)

    start = time.time()
    with ThreadPoolExecutor(together) as pool:
        trials = list(pool.map(trial, range(size)))
    makespan = time.time() - start
    best = max(range(size), key=lambda number: float(trials[number]["accuracy"]))
    parts = {
        "rollout": sum(sum(run["rollout_s"]) for run in trials) / together,
        "update": sum(sum(run["step_s"]) - sum(run["rollout_s"]) for run in trials) / together,
        "eval": sum(run["eval_s"] for run in trials) / together,
    }
    return {
        "makespan_s": round(makespan, 2),
        "best": trials[best]["accuracy"],
        "parts_s": with_rest(parts, makespan),
        "best_adapter": str(root / f"adapter{best}"),
        "counts": {Status.COMPLETE.value: size},
    }


def our_sweep(size: int, root: Path, overrides: Sequence[str], *steps: int) -> dict[str, Any]:
    """Run `python -m harness.sweep` of a recipe with these trials."""
    (root / "sweep.yaml").write_text(yaml.safe_dump(our_recipe(size, *steps), sort_keys=False))
    return sweep_of(str(root / "sweep.yaml"), root, overrides)


def sweep_of(
    recipe: str, root: Path, overrides: Sequence[str], code: Path = PROJECT
) -> dict[str, Any]:
    """Run `python -m harness.sweep` with the code of another folder; its report is timed too."""
    given = [f"trainer.ckpt_path={root}", "trainer.run_name=sweep", *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(code)
    start = time.time()
    with (root / "log.txt").open("wb") as log:
        status = subprocess.run(
            [sys.executable, "-m", "harness.sweep", recipe, *given],
            cwd=code,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    makespan = time.time() - start
    if status != 0:
        raise RuntimeError(
            f"harness.sweep exited with {status}:\n{(root / 'log.txt').read_text()[-3000:]}"
        )
    return {
        "makespan_s": round(makespan, 2),
        **read_sweep(RunDir(root / "sweep"), start, makespan),
    }


def our_recipe(size: int, *steps: int) -> dict[str, Any]:
    """Return the quickstart's recipe with these trials for its sweep.

    Each has one evaluation and one checkpoint, at the end. With several numbers of `steps` the
    trials use them alternately.
    """
    content: dict[str, Any] = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    content["trainer"] |= {
        "train_batch_size": COMPLETIONS // 8,
        "policy_mini_batch_size": COMPLETIONS // 8,
        "max_steps": steps[0],
        "eval_before_train": False,
        "eval_interval": 0,
        "ckpt_interval": 0,
    }
    content["generator"] |= {"backend": ENGINE, "max_num_seqs": 512}
    content["expect"] = {}
    choices = (RANK, ALPHA, TARGETS, LENGTH)
    trials: list[dict[str, Any]] = [
        {RANK: rank, ALPHA: alpha, RATE: rate, TARGETS: targets, LENGTH: steps[number % len(steps)]}
        for number, (rank, alpha, rate, targets) in enumerate(CONFIGURATIONS[:size])
    ]
    content["sweep"] = {
        "metric": "eval/accuracy",
        "num_trials": size,
        "seeds": [0],
        "sampler": "random",
        "first_trials": trials,
        "space": {
            **{key: {"choices": sorted({trial[key] for trial in trials})} for key in choices},
            RATE: {"low": 1e-4, "high": 3e-3, "log": True},
        },
    }
    return content


def read_sweep(sweep: RunDir, start: float, makespan: float) -> dict[str, Any]:
    """Return a finished sweep's best trial, the parts of its time, and its gaps."""
    trials = [RunDir(folder) for folder in sorted(sweep.trials.iterdir())]
    manifests = [trial.read_manifest() for trial in trials]
    statuses = [manifest["status"] for manifest in manifests]
    complete = [number for number, status in enumerate(statuses) if status == Status.COMPLETE.value]
    scores = {
        number: manifests[number]["result"]["metrics"]["eval/accuracy"] for number in complete
    }
    best = max(scores, key=lambda number: float(scores[number]))
    together = yaml.safe_load(sweep.recipe.read_text())["sweep"]["max_concurrent"]
    parts = {name: seconds / together for name, seconds in time_of_parts(trials).items()}
    began, ended = [when(m, 1) for m in manifests], [when(m, -1) for m in manifests]
    parts["report"] = start + makespan - max(ended)
    return {
        "best": scores[best],
        "best_adapter": str(trials[best].adapter / "final"),
        "counts": {status: statuses.count(status) for status in sorted(set(statuses))},
        "steps_trained": sum(len(steps_of(trial)) for trial in trials),
        "first_trial_after_s": round(min(began) - start, 2),
        "last_trial_ended_s": round(max(ended) - start, 2),
        "next_trial_after_s": gaps(began, ended),
        "parts_s": with_rest(parts, makespan),
    }


def steps_of(trial: RunDir) -> list[dict[str, float]]:
    """Return a trial's rows of training steps."""
    return [row for row in MetricsFile(trial.metrics).rows() if "step_time" in row]


def time_of_parts(trials: Sequence[RunDir]) -> dict[str, float]:
    """Return seconds in each part of the trials' steps.

    Members of a pack log the same time for a shared step, which is counted once.
    """
    shared: dict[tuple[float, ...], dict[str, float]] = {}
    alone = dict.fromkeys(PARTS, 0.0)
    for trial in trials:
        for row in steps_of(trial):
            step = {
                part: row.get(f"timing_s/{part}", 0.0)
                for part in ("rollout", "logprobs", "update", "sync")
            }
            shared[tuple(step.values())] = step
            for part in ("checkpoint", "eval"):
                alone[part] += row.get(f"timing_s/{part}", 0.0)
    return alone | {
        part: sum(step[part] for step in shared.values())
        for part in ("rollout", "logprobs", "update", "sync")
    }


def when(manifest: dict[str, Any], change: int) -> float:
    """Return when a status changed, in seconds since the epoch.

    `change` 1 is the start of training, -1 its end.
    """
    return datetime.fromisoformat(manifest["status_history"][change]["time"]).timestamp()


def gaps(began: Sequence[float], ended: Sequence[float]) -> list[float]:
    """Return seconds from a trial's end to the next start.

    Trials that started before any had ended are left out.
    """
    waits, free = [], sorted(ended)
    for start in sorted(began):
        if free and free[0] <= start:
            waits.append(round(start - free.pop(0), 3))
    return waits


def with_rest(parts: dict[str, float], makespan: float) -> dict[str, float]:
    """Return the parts, and the rest of the makespan: start-up, waiting and handover."""
    parts = {part: round(seconds, 2) for part, seconds in parts.items()}
    return {"start-up and waiting": round(makespan - sum(parts.values()), 2), **parts}


if __name__ == "__main__":
    main()
