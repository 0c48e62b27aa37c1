"""`python -m harness.evaluate RUN --data FILE...`: score a run's policy on other problems."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.core.cli import Parser, invocation, run_command
from harness.core.errors import UserError
from harness.core.paths import shown
from harness.export import refuse_sweep
from harness.records import manifest
from harness.records.files import whole_folder, write_json
from harness.records.run_dir import RunDir
from rltrain.tools import export, preflight

if TYPE_CHECKING:
    import pandas as pd

POLICY = "trainer.policy.model"
ALL_SAMPLES = 10**9


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = Parser(
        prog=invocation("evaluate"),
        description="Score a run's policy, and what it was trained from, on data files.",
    )
    parser.add_argument("run", type=Path, help="a run's directory, or a sweep's trial's")
    parser.add_argument("overrides", nargs="*", help="key=value, of sampling or the machine")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="data files, each scored by itself"
    )
    parser.add_argument(
        "--which",
        choices=["final", "best"],
        default="final",
        help="the policy after the last step, or at its best evaluation (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="the folder for scores and completions; it must not exist yet",
    )
    arguments = parser.parse_intermixed_args(argv)
    names = [Path(file).stem for file in arguments.data]
    if len(set(names)) < len(names):
        raise UserError(
            "two data files have the same name, and so would their completions",
            got=", ".join(arguments.data),
            fix="score them by two commands",
        )
    refuse_sweep(arguments.run)
    planned = plan(
        export.plan(arguments.run, arguments.output, which=arguments.which),
        arguments.data,
        arguments.overrides,
    )
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    samples = {policy: sample(policy, group) for policy, group in planned.items()}
    with whole_folder(arguments.output, sealed=False) as folder:
        scores = []
        for number, name in enumerate(names):
            tables = {policy: tables[number] for policy, tables in samples.items()}
            for policy, table in tables.items():
                table.to_parquet(folder / f"{name}-{policy}.parquet")
            scores.append({"data": arguments.data[number], **compare(tables)})
        write_json(folder / "scores.json", scores)
    for score in scores:
        print("  ".join(f"{key} {_shown(value)}" for key, value in score.items()))
    print(f"in brackets 95% intervals over problems; completions  {shown(arguments.output)}")
    return 0


def plan(
    exported: export.Export, files: Sequence[str], overrides: Sequence[str]
) -> dict[str, list[Recipe]]:
    """Return recipes that evaluate two policies on each data file before their first step.

    The policies are what the run was trained from, `base` or `start`, and its own, `final` or
    `best`. The recipes are the run's with `overrides`. Raises UserError for overrides, data or a
    machine that would not do.
    """
    recipe = recipes.with_overrides(exported.recipe, overrides)
    lora = recipe.trainer.policy.model.lora
    fresh: dict[str, Any] = {f"{POLICY}.lora.rank": 1} if lora.rank == 0 else {}
    if exported.is_adapter:
        trained = {f"{POLICY}.lora.adapter_path": str(exported.source)}
    else:
        trained = {**fresh, f"{POLICY}.path": str(exported.source)}
    settings = {
        "trainer.algorithm.advantage_estimator": "grpo",
        "trainer.algorithm.use_kl_loss": False,
        "trainer.algorithm.use_kl_in_reward": False,
        "trainer.train_batch_size": 1,
        "trainer.policy_mini_batch_size": 1,
        "trainer.max_steps": 1,
        "trainer.resume_mode": "none",
        "trainer.eval_before_train": True,
        "trainer.samples_per_dump": ALL_SAMPLES,
    }
    before = "base" if lora.adapter_path is None else "start"
    planned = {}
    for policy, values in ((before, fresh), (exported.source.name, trained)):
        planned[policy] = [
            recipes.with_values(
                recipe, {**settings, **values, "data.train_data": [file], "data.val_data": [file]}
            )
            for file in files
        ]
        for evaluation in planned[policy]:
            preflight.check_run(evaluation)
    return planned


def sample(policy: str, evaluations: Sequence[Recipe]) -> list[pd.DataFrame]:
    """Return a policy's completions of each recipe's problems, with their rewards."""
    import pandas as pd

    from rltrain.worker_group import open_trainer

    tables = []
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log.txt"
        with open_trainer(evaluations[0], log=log) as trainer:
            for number, recipe in enumerate(evaluations):
                print(f"{policy}: {recipe.data.val_data[0]} ...", flush=True)
                run_dir = RunDir(Path(scratch) / str(number))
                record = manifest.build(recipe, kind="run", name=policy, source="evaluate")
                run_dir.create(recipes.to_yaml(recipe), record)
                trainer.add(recipe, run_dir)
                tables.append(pd.read_parquet(run_dir.eval_samples(0)))
                trainer.remove(run_dir)
    return tables


def compare(samples: Mapping[str, pd.DataFrame]) -> dict[str, int | list[float]]:
    """Return the mean reward of two policies, and of the second less the first.

    Each is a list of a value and the ends of its 95% interval over problems.
    """
    from analysis.stats.paired import mean_over_problems

    rewards = {name: table.groupby("index")["reward"].mean() for name, table in samples.items()}
    before, after = rewards.values()
    means = {**rewards, "difference": after - before}
    estimates = {name: mean_over_problems(values) for name, values in means.items()}
    return {"problems": len(before)} | {
        name: [estimate.value, *estimate.interval(0.025)] for name, estimate in estimates.items()
    }


def _shown(value: str | int | list[float]) -> str:
    if not isinstance(value, list):
        return str(value)
    mean, low, high = value
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    run_command(main)
