"""Run and sweep directories with a known truth, written through the same records as real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.report.write import WrittenReport, read, report_folder, write
from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.records import manifest as manifests
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status

RANK = "trainer.policy.model.lora.rank"
ALPHA = "trainer.policy.model.lora.alpha"
LR = "trainer.policy.optimizer_config.lr"
TARGETS = "trainer.target_modules"
PROBLEMS = 512
BASE = 149 / PROBLEMS


@dataclass(frozen=True)
class Trial:
    """One trial to write: its place in the sweep, its parameters and how it ended."""

    configuration: int
    seed: int
    params: dict[str, Any]
    score: float
    status: Status = Status.COMPLETE
    reason: str | None = None
    last_step: int = 50
    completion: str = "3 + 4 = 7\n#### 7"
    confirm: bool = False


@dataclass(frozen=True)
class Sweep:
    """What to sweep: the recipe's sweep block and the trials."""

    trials: Sequence[Trial]
    metric: str = "eval/accuracy"
    seeds: Sequence[int] = (0, 1)
    overrides: Sequence[str] = ()
    status: Status = Status.COMPLETE
    space: dict[str, Any] = field(default_factory=dict)


def params(rank: int, lr: float, alpha: float = 32, targets: Any = "all-linear") -> dict[str, Any]:
    """A trial's parameters in the recipe's keys."""
    return {RANK: rank, ALPHA: alpha, LR: lr, TARGETS: targets}


def write_sources(root: Path) -> tuple[Path, Path]:
    """A recipe file to sweep and its held-out problems; returns both paths."""
    problems = root / "validation.parquet"
    if not problems.exists():
        root.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"question": [f"question {i}" for i in range(PROBLEMS)]}).to_parquet(problems)
    source = root / "tiny.yaml"
    source.write_text(
        "defaults: [base, _self_]\n"
        f"data: {{train_data: [{problems}], val_data: [{problems}]}}\n"
        "trainer:\n"
        "  policy: {model: {path: tiny-model}}\n"
        "  train_batch_size: 16\n"
        "  policy_mini_batch_size: 16\n"
        "  max_steps: 50\n"
        "generator: {n_samples_per_prompt: 8}\n"
    )
    return source, problems


def write_sweep(root: Path, sweep: Sweep, name: str = "lora_sweep") -> Path:
    """Write a sweep's directory with a directory per trial; returns its path."""
    source, _ = write_sources(root)
    count = max(1, len(sweep.trials))
    block = {
        "metric": sweep.metric,
        "num_trials": count,
        "seeds": list(sweep.seeds),
        "space": sweep.space,
    }
    plain = recipes.load(source, sweep.overrides)
    swept = recipes.with_values(plain, {"sweep": block})
    directory = RunDir(root / name)
    built = manifests.build(
        swept,
        kind="sweep",
        name=name,
        source=str(source),
        overrides=sweep.overrides,
        command=["python", "-m", "harness.sweep", str(source), *sweep.overrides],
    )
    directory.create(recipes.to_yaml(swept), built)
    for number, trial in enumerate(sweep.trials):
        values = {**trial.params, "seed": trial.seed, "generator.max_lora_rank": 64}
        facts = {
            "number": number,
            "configuration": trial.configuration,
            "seed": trial.seed,
            "params": trial.params,
            "confirm": trial.confirm,
        }
        one = recipes.with_values(plain, values)
        kept = [
            item
            for item in sweep.overrides
            if item.split("=")[0] not in values and not item.startswith("sweep.")
        ]
        own = [*kept, *(recipes.override_for(key, value) for key, value in values.items())]
        name = f"{directory.path.name}/{number:04d}"
        built = manifests.build(
            one, kind="trial", name=name, source=str(source), overrides=own, trial=facts
        )
        _write_run(directory.trial(number), one, built, trial, sweep.metric)
    directory.move_to(Status.RUNNING)
    if sweep.status is not Status.RUNNING:
        directory.move_to(sweep.status)
    return directory.path


def write_run(root: Path, trial: Trial, name: str = "one_run") -> Path:
    """Write a single run's directory; returns its path."""
    source, _ = write_sources(root)
    overrides = [
        recipes.override_for(key, value)
        for key, value in {**trial.params, "seed": trial.seed}.items()
    ]
    recipe = recipes.load(source, overrides)
    command = ["python", "-m", "harness.run", str(source), *overrides]
    built = manifests.build(
        recipe, kind="run", name=name, source=str(source), overrides=overrides, command=command
    )
    directory = RunDir(root / name)
    _write_run(directory, recipe, built, trial, "eval/accuracy")
    return directory.path


def curve(score: float, steps: int, base: float, rng: np.random.Generator) -> list[float]:
    """Evaluations every 10 steps from the base to the score, in whole problems, the last
    one exact.
    """
    at = np.arange(0, steps + 1, 10)
    values = (
        base
        + (score - base) * (1 - np.exp(-at / 12)) / (1 - np.exp(-steps / 12))
        + rng.normal(0, 0.008, len(at))
    )
    values[0], values[-1] = base, score
    return [round(float(value) * PROBLEMS) / PROBLEMS for value in np.clip(values, 0, 1)]


def _write_run(
    run: RunDir, recipe: Recipe, built: dict[str, Any], trial: Trial, metric: str
) -> None:
    run.create(recipes.to_yaml(recipe), built)
    if trial.status is Status.CREATED:
        return
    run.move_to(Status.RUNNING)
    rng = np.random.default_rng(trial.configuration * 97 + trial.seed)
    evaluations = curve(trial.score, trial.last_step, BASE, rng)
    file = MetricsFile(run.metrics)
    for step in range(0, trial.last_step + 1, 5):  # every fifth: each row is synced to the disk
        row: dict[str, float] = {"step": step}
        if step:
            row |= {
                "reward": min(1.0, evaluations[step // 10] + 0.02),
                "learning_rate": 1e-3,
                "step_time": 0.9,
            }
        if step % 10 == 0:
            row |= {metric: evaluations[step // 10], "eval/mean_length": 40.0, "timing_s/eval": 1.5}
        file.append(row)
    for step in (0, trial.last_step):
        _write_samples(run, step, trial)
    values: dict[str, Any] = {}
    if trial.status is Status.COMPLETE:
        final = {metric: evaluations[-1], "eval/mean_length": 40.0}
        values["result"] = {
            "step": trial.last_step,
            "metrics": final,
            "base": {metric: evaluations[0]},
            "seconds": 61.5,
            "best": {"step": trial.last_step, metric: evaluations[-1]},
        }
    if trial.status is not Status.RUNNING:
        run.move_to(trial.status, reason=trial.reason, **values)


def _write_samples(run: RunDir, step: int, trial: Trial) -> None:
    run.samples.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "step": step,
            "phase": phase,
            "index": index,
            "question": f"Ann has {index + 3} apples and buys 4 more. How many apples does "
            "she have now?",
            "ground_truth": str(index + 7),
            "completion": trial.completion if step else f"The answer is {index + 9}",
            "reward": 1.0 if step else 0.0,
            "num_tokens": 12,
            "finish_reason": "stop",
        }
        for phase in ("train", "eval")
        for index in range(8)
    ]
    pd.DataFrame(rows).to_parquet(run.samples / f"step_{step:06d}.parquet", index=False)


def example() -> Sweep:
    """Twelve trials on two seeds: configuration 2 (rank 8, lr 1e-3) is best; one FAILED, one
    PRUNED, one RUNNING.

    Configuration 4 has the best single score but not both seeds, and 5's failed trial logged a
    higher one still: neither may win.
    """
    reason = "3 non-finite gradient norms in a row at step 20"
    return Sweep(
        [
            Trial(0, 0, params(8, 1e-5), 0.30),
            Trial(0, 1, params(8, 1e-5), 0.33),
            Trial(1, 0, params(8, 3e-4), 0.86),
            Trial(1, 1, params(8, 3e-4), 0.84),
            Trial(2, 0, params(8, 1e-3), 0.92),
            Trial(2, 1, params(8, 1e-3), 0.90),
            Trial(3, 0, params(1, 1e-3, targets=["q_proj", "v_proj"]), 0.80),
            Trial(3, 1, params(1, 1e-3, targets=["q_proj", "v_proj"]), 0.82),
            Trial(4, 0, params(1, 3e-3), 0.95),
            Trial(4, 1, params(1, 3e-3), 0.70, Status.RUNNING, last_step=30),
            Trial(5, 0, params(8, 1e-2), 0.99, Status.FAILED, reason, last_step=20),
            Trial(
                5,
                1,
                params(8, 1e-2),
                0.10,
                Status.PRUNED,
                "step 10: below the median",
                last_step=10,
            ),
        ]
    )


def rewrite_manifest(run_dir: Path, **values: Any) -> None:
    """Change a manifest's fields without the state machine, as damage would."""
    path = run_dir / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_report(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    refresh: int | None = None,
    processes: int = 1,
) -> WrittenReport:
    """Write the report of one directory, by default into its own `report/`."""
    experiments = read([directory])
    folder = report_folder(directory) if output is None else Path(output)
    return write(experiments, folder, refresh=refresh, processes=processes)
