"""Train small runs in this process, and compare their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from safetensors.torch import load_file

from harness.config.metrics import without_timings
from harness.config.schema import Recipe
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.report import StepReport
from rltrain.trainer import Trainer

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[[Recipe, str], RunDir]
Open = Callable[..., tuple[Pack, Member]]


def train_run(recipe: Recipe, run: RunDir, *, stop_after: int | None = None) -> None:
    """Train to the end, or stop after that many reports, like a kill."""
    with Trainer(recipe) as trainer:
        list(islice(train(trainer, recipe, run), stop_after))


def train(trainer: Trainer, recipe: Recipe, run: RunDir) -> Iterator[StepReport]:
    """Add a run and train it to its end.

    Raises the error that fails the run.
    """
    reports = trainer.add(recipe, run)
    yield from reports
    while not (reports and reports[-1].done):
        outcome = trainer.step([run])[run.path]
        if isinstance(outcome, Exception):
            raise outcome
        reports = [outcome]
        yield outcome


def rows(run: RunDir) -> list[dict[str, float]]:
    """Return a run's metrics without timings."""
    return [without_timings(row) for row in MetricsFile(run.metrics).rows()]


def adapter(run: RunDir) -> dict[str, torch.Tensor]:
    """Return a run's final adapter."""
    return load_file(run.adapter / "final" / "adapter_model.safetensors")


def assert_equal(one: RunDir, two: RunDir) -> None:
    """Assert that two runs have the same metrics and the same adapter, to the bit."""
    assert rows(one) == rows(two)
    first, second = adapter(one), adapter(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
