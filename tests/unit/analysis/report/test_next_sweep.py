"""Every command that a page prints can be run: it composes, and each run that it asks for is a
valid recipe.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis.claims import CLAIMS
from analysis.experiment import Experiment
from analysis.report.decisions import decisions
from analysis.report.next_step import next_step
from harness.config import recipe as recipes
from harness.config.schema import Recipe
from sweeps.study import plan
from tests.unit.analysis.synthetic import LR, RANK, Sweep, Trial, params, write_run, write_sweep

MERGE = ["trainer.policy.model.lora.sync=merge"]
BATCH, MINI, STEPS = (
    "trainer.train_batch_size",
    "trainer.policy_mini_batch_size",
    "trainer.max_steps",
)


def over(
    values: Sequence[dict[str, Any]], scores: Sequence[Sequence[float]], **sweep: Any
) -> Sweep:
    """A sweep whose configurations have these parameters, and a score for each seed."""
    trials = [
        Trial(place, seed, one, score)
        for place, (one, seeds) in enumerate(zip(values, scores, strict=True))
        for seed, score in enumerate(seeds)
    ]
    return Sweep(trials, seeds=list(range(len(scores[0]))), **sweep)


def ranks(*given: int, scores: Sequence[Sequence[float]], **sweep: Any) -> Sweep:
    """A sweep over ranks."""
    return over(
        [params(rank, 1e-3) for rank in given],
        scores,
        space={RANK: {"choices": list(given)}},
        **sweep,
    )


def batches() -> Sweep:
    """Batch sizes that each come with a number of steps."""
    values = [{**params(8, 1e-3), BATCH: size, MINI: size, STEPS: 400 // size} for size in (8, 16)]
    keys = (BATCH, MINI, STEPS)
    axes = ",".join(f"{key}:{{choices:{[one[key] for one in values]}}}" for key in keys)
    return over(values, [[0.9, 0.91], [0.8, 0.95]], overrides=[f"sweep.space={{{axes}}}"])


def confirmed() -> Sweep:
    """Two ranks run again on fresh seeds, which turn their order round."""
    scores = {False: {1: 0.8, 2: 0.85}, True: {1: 0.8, 2: 0.75}}
    return Sweep(
        [
            Trial(place, seed + 100 * fresh, params(rank, 1e-3), score + seed / 50, confirm=fresh)
            for fresh, by_rank in scores.items()
            for place, (rank, score) in enumerate(by_rank.items())
            for seed in (0, 1)
        ]
    )


SWEEPS: dict[str, Callable[[], Sweep]] = {
    "ranks alike": lambda: ranks(2, 8, 32, scores=[[0.8, 0.84], [0.81, 0.83], [0.79, 0.85]]),
    "ranks, one seed": lambda: ranks(2, 8, scores=[[0.8], [0.82]]),
    "full fine-tuning at LoRA's rate": lambda: ranks(
        0, 2, scores=[[0.35, 0.33], [0.9, 0.92]], overrides=MERGE
    ),
    "full fine-tuning ahead": lambda: ranks(
        0, 8, scores=[[0.9, 0.92], [0.4, 0.42]], overrides=MERGE
    ),
    "a collapsed seed": lambda: ranks(
        2, 8, 32, scores=[[0.8, 0.81, 0.8], [0.9, 0.91, 0.3], [0.5, 0.51, 0.5]]
    ),
    "rates to the edge": lambda: over(
        [params(8, lr) for lr in (3e-4, 1e-3)], [[0.6, 0.63], [0.7, 0.74]]
    ),
    "target modules": lambda: over(
        [params(8, 1e-3, targets=one) for one in ("all-linear", ["q_proj", "v_proj"])],
        [[0.9, 0.95], [0.85, 0.92]],
    ),
    "batch sizes with their steps": batches,
    "confirmed": confirmed,
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_every_command_of_a_sweeps_page_can_be_run(tmp_path: Path, kind: str) -> None:
    path = write_sweep(tmp_path, SWEEPS[kind]())
    found = Experiment.open(path)
    decided = decisions(found)
    # What no run varied is asked for in the same way by every page: the run's page below has all of
    # it.
    commands = {
        next_step(found, decided).command,
        *(one.command for one in decided if one.verdict != "not tested"),
    }
    commands |= {found.command("trials/0000")}
    assert len(commands - {None}) > 1
    for command in commands - {None}:
        try_out(str(command), path)


def test_every_command_of_a_runs_page_can_be_run(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    found = Experiment.open(path)
    commands = [one.command for one in decisions(found)]
    assert len(commands) == 5
    for command in (*commands, found.command(".")):
        try_out(str(command), path)


@pytest.mark.parametrize("recipe", sorted({claim.recipe for claim in CLAIMS.values()}))
def test_every_command_of_a_claim_can_be_run(tmp_path: Path, recipe: str) -> None:
    claim = next(claim for claim in CLAIMS.values() if claim.recipe == recipe)
    try_out(claim.command(), tmp_path)


def test_full_fine_tuning_gets_learning_rates_of_its_own(tmp_path: Path) -> None:
    found = Experiment.open(write_sweep(tmp_path, SWEEPS["full fine-tuning at LoRA's rate"]()))
    rank = next(one for one in decisions(found) if one.question == "Which rank?")
    recipe = recipe_of(str(rank.command))
    assert recipe.trainer.policy.model.lora.rank == 0
    [axis] = plan.build(recipe).space.axes
    assert axis.key == LR
    assert max(axis.values() or ()) < 1e-3


def try_out(command: str, directory: Path) -> None:
    """Compose a command's recipe, plan its sweep, and try each configuration of a grid."""
    python, flag, module, *rest = shlex.split(command)
    assert (python, flag) == ("python", "-m")
    if "--resume" in rest:
        assert rest[:2] == ["--resume", str(directory)]
        assert rest[2] == "--confirm"
        assert int(rest[3]) > 0
        return
    recipe = recipe_of(command)
    if module == "harness.run":
        return
    assert module == "harness.sweep"
    planned = plan.build(recipe)
    for point in plan.preview(planned, min(4, planned.num_configurations)):
        assert planned.refusal(point) is None
        if RANK in point:
            assert isinstance(point[RANK], int)


def recipe_of(command: str) -> Recipe:
    """The recipe that a command composes; the examples' data are those of the tests."""
    source, *overrides = shlex.split(command)[3:]
    return recipes.load(source, overrides)
