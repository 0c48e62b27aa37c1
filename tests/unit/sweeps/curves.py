"""A substitute for training: learning curves by formula, to test sweeps without the trainer."""

from __future__ import annotations

import errno
import functools
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.records import manifest
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from rltrain.report import StepReport
from sweeps.study import plan as plans
from sweeps.study.plan import Plan
from sweeps.study.sizing import settle

RANK = "trainer.policy.model.lora.rank"
ALPHA = "trainer.policy.model.lora.alpha"
LR = "trainer.policy.optimizer_config.lr"
TARGETS = "trainer.target_modules"
SPACE: dict[str, Any] = {
    RANK: {"choices": [1, 8, 32]},
    LR: {"low": 1e-5, "high": 1e-2, "log": True},
    TARGETS: {"choices": ["all-linear", ["q_proj", "v_proj"]]},
}
STEPS, INTERVAL = 4, 1
# Ranks at which a run fails in a certain way.
RAISES, DIES, IS_NAN, HANGS, FULL = 13, 14, 15, 16, 17


def recipe_of(space: dict[str, Any] | None = None, *, steps: int = STEPS, **sweep: Any) -> Recipe:
    """Return a recipe with a sweep over `space`."""
    defaults = {"metric": "eval/accuracy", "num_trials": 4, "sampler": "random", "pack_size": 1}
    block = defaults | {"space": SPACE if space is None else space} | sweep
    return recipes.with_values(_base(), {"trainer.max_steps": steps, "sweep": block})


@functools.cache
def _base() -> Recipe:
    overrides = [
        "trainer.policy.model.path=rltrain",
        "trainer.placement.device=cpu",
        "trainer.num_threads=1",
        f"trainer.eval_interval={INTERVAL}",
    ]
    return recipes.load("base", overrides)


def begin(recipe: Recipe, folder: Path) -> tuple[Plan, RunDir]:
    """Make a sweep's directory; return its settled plan and the directory."""
    plan = settle(plans.build(recipe))
    sweep_dir = RunDir(folder)
    record = manifest.build(plan.recipe, kind="sweep", name=folder.name, source="recipes/base.yaml")
    sweep_dir.create(recipes.to_yaml(plan.recipe), record)
    return plan, sweep_dir


def curve(rank: int, step: int) -> float:
    """Return a made-up accuracy: rank 1 learns slowly; all ranks start at the base's."""
    return 0.25 + step * (0.0625 if rank == 1 else 0.125)


def follow(run_dir: RunDir) -> Iterator[StepReport]:
    """Yield the reports of a run that computes nothing."""
    recipe = recipes.read(run_dir.recipe)
    rank, total = recipe.trainer.policy.model.lora.rank, recipe.trainer.max_steps or 0
    run_dir.move_to(Status.RUNNING)
    print(
        f"pid {os.getpid()} threads {os.environ['OMP_NUM_THREADS']} cwd {os.getcwd()}", flush=True
    )
    log = MetricsFile(run_dir.metrics)
    for step in range(total + 1):
        if step == 2 and rank == RAISES:
            raise ValueError("this rank is unlucky\nin two lines")
        if step == 2 and rank == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and rank == HANGS:
            time.sleep(3600)
        if step == 2 and rank == FULL and not (run_dir.path.parent / "room").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(run_dir.checkpoints))
        row = {"step": step, "eval/accuracy": math.nan if rank == IS_NAN else curve(rank, step)}
        log.append(row)
        if step == total:
            run_dir.move_to(Status.COMPLETE, result={"step": step, "metrics": row, "seconds": 1.0})
        yield StepReport(step, total, row)


class Curves:
    """A trainer whose runs follow `curve`."""

    isolates_failures = True

    def __init__(self) -> None:
        self._reports: dict[Path, Iterator[StepReport]] = {}

    def add(self, recipe: Recipe, run_dir: RunDir) -> list[StepReport]:
        self._reports[run_dir.path] = follow(run_dir)
        return [next(self._reports[run_dir.path])]

    def step(self, run_dirs: Sequence[RunDir]) -> dict[Path, StepReport | Exception]:
        outcomes: dict[Path, StepReport | Exception] = {}
        for run_dir in run_dirs:
            try:
                outcomes[run_dir.path] = next(self._reports[run_dir.path])
            except Exception as error:
                outcomes[run_dir.path] = error
        return outcomes

    def remove(self, run_dir: RunDir) -> None:
        self._reports.pop(run_dir.path, None)


def curve_server() -> type:
    """Return a pack server whose trainer follows `curve`."""
    import ray.cloudpickle

    from sweeps.execution.pack_server import PackServer

    class CurveServer(PackServer):
        def _open_trainer(self) -> Any:
            return Curves()

    # Ray's workers cannot import the tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return CurveServer
