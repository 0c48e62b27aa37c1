"""Fixtures for small real runs on the embedded model."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.records import manifest
from harness.records.run_dir import RunDir
from tests.recipes import quickstart
from tests.unit.analysis.conftest import experiment as experiment
from tests.unit.analysis.conftest import sweep_dir as sweep_dir

if TYPE_CHECKING:
    from rltrain.member import Member
    from rltrain.pack import Pack
    from tests.integration.training import MakeRecipe, MakeRun, Open


def restore_interrupts() -> None:
    """Restore the default handling of SIGINT in a child process before it starts.

    Tests that run in the background ignore SIGINT, and children would inherit that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def small_data(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides that make quickstart a run of seconds.

    It has few problems and small batches, and samples with transformers.
    """
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", 24), ("validation", 12)):
        pd.read_parquet(tiny_model_dir / "data" / f"{name}.parquet").head(rows).to_parquet(
            folder / f"{name}.parquet"
        )
    return [
        f"data.train_data=[{folder}/train.parquet]",
        f"data.val_data=[{folder}/validation.parquet]",
        "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=2",
        "trainer.micro_train_batch_size_per_gpu=4",
        "trainer.max_tokens_per_microbatch=null",
        "generator.n_samples_per_prompt=4",
        "generator.backend=transformers",
        "trainer.max_steps=4",
        "trainer.ckpt_interval=2",
        "trainer.eval_interval=2",
    ]


@pytest.fixture
def small_recipe(small_data: list[str]) -> Callable[..., Recipe]:
    """Return a function that composes a small run's recipe with further overrides."""

    def make(*overrides: str) -> Recipe:
        recipe = quickstart([*small_data, *overrides])
        recipe.sweep = None
        return recipe

    return make


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[[Recipe, str], RunDir]:
    """Return a function that makes a fresh run directory for a recipe."""

    def make(recipe: Recipe, name: str) -> RunDir:
        run = RunDir(tmp_path / name)
        run.create(
            recipes.to_yaml(recipe), manifest.build(recipe, kind="run", name=name, source="test")
        )
        return run

    return make


@pytest.fixture
def opened(small_recipe: MakeRecipe, new_run: MakeRun) -> Iterator[Open]:
    """Return a function that opens a pack with one member of a small recipe, ready to sample."""
    from rltrain.pack import Pack

    packs: list[Pack] = []

    def make(*overrides: str) -> tuple[Pack, Member]:
        recipe = small_recipe(*overrides)
        packs.append(Pack.open(recipe))
        member = packs[-1].add(recipe, new_run(recipe, f"run{len(packs)}"))
        packs[-1].publish_member(member)
        return packs[-1], member

    yield make
    for pack in packs:
        pack.close()
