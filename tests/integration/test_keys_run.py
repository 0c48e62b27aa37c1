"""Test when a run evaluates and saves, where it saves, and how it resumes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness.config.schema import Recipe
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from harness.run import main
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.report import StepReport
from rltrain.trainer import Trainer
from tests.integration.training import train

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[[Recipe, str], RunDir]


def _evaluated(run: RunDir) -> list[int]:
    return [int(row["step"]) for row in MetricsFile(run.metrics).rows() if "eval/accuracy" in row]


def _checkpoints(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_evaluations_checkpoints_and_samples_of_a_run(
    small_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [
        "ckpt_interval=2",
        "max_ckpts_to_keep=2",
        "eval_interval=3",
        "eval_before_train=false",
        "samples_per_dump=5",
        "max_steps=5",
        f"ckpt_path={tmp_path}/there",
        "run_name=named",
        "logger=[console,tensorboard]",
    ]
    assert main(["quickstart", *small_data, *(f"trainer.{key}" for key in keys)]) == 0
    run = RunDir(tmp_path / "there" / "named")
    assert [row["step"] for row in MetricsFile(run.metrics).rows()] == [1, 2, 3, 4, 5]
    assert _checkpoints(run) == ["step_000004", "step_000005"]
    assert _evaluated(run) == [3, 5]
    samples = {path.name: pd.read_parquet(path) for path in run.samples.iterdir()}
    assert sorted(samples) == ["step_000003.parquet", "step_000005.parquet"]
    assert [len(rows) for rows in samples.values()] == [5, 5]
    # Evaluated on the first file of data.val_data.
    held_out = pd.read_parquet(small_data[1].split("=")[1].strip("[]"))
    assert [list(rows["question"]) for rows in samples.values()] == [
        [i["question"] for i in held_out.extra_info[:5]]
    ] * 2
    assert "step 5/5" in capsys.readouterr().out
    assert list((run.path / "tensorboard").iterdir())


def test_intervals_of_0_mean_the_last_step_only(
    small_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [
        "ckpt_interval=0",
        "eval_interval=0",
        "samples_per_dump=0",
        "max_steps=2",
        f"ckpt_path={tmp_path}",
        "run_name=run",
        "logger=tensorboard",
    ]
    assert main(["quickstart", *small_data, *(f"trainer.{key}" for key in keys)]) == 0
    run = RunDir(tmp_path / "run")
    assert _checkpoints(run) == ["step_000002"]
    assert _evaluated(run) == [0, 2]  # eval_before_train alone causes the first evaluation
    assert all(len(pd.read_parquet(path)) == 0 for path in run.samples.iterdir())
    assert "step 2/2" not in capsys.readouterr().out


@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads(small_recipe: MakeRecipe, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        Pack.open(small_recipe(f"trainer.num_threads={threads}")).close()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def _joined(pack: Pack, recipe: Recipe, run: RunDir) -> Member:
    member = pack.add(recipe, run)
    pack.remove(member)
    return member


def test_an_epoch_has_every_problem_once(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe(
        "trainer.max_steps=null", "trainer.epochs=2", "trainer.train_batch_size=8"
    )
    pack = Pack.open(recipe)
    member = _joined(pack, recipe, new_run(recipe, "epochs"))
    assert member.total_steps == 6  # 24 problems
    epochs = [[p.example.index for _ in range(3) for p in member.next_problems()] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 2
    assert epochs[0] != epochs[1]
    limited = small_recipe("trainer.max_steps=7", "trainer.epochs=2", "trainer.train_batch_size=8")
    assert _joined(pack, limited, new_run(limited, "steps")).total_steps == 7
    # An incomplete last batch is dropped.
    uneven = small_recipe(
        "trainer.max_steps=null", "trainer.epochs=3", "trainer.train_batch_size=10"
    )
    assert _joined(pack, uneven, new_run(uneven, "uneven")).total_steps == 6
    pack.close()


def test_the_order_of_the_data_follows_the_seed(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    pack = Pack.open(small_recipe())
    order = []
    for name, override in (("one", "seed=1"), ("same", "trainer.seed=1"), ("other", "seed=2")):
        recipe = small_recipe(override)
        member = _joined(pack, recipe, new_run(recipe, name))
        order.append([problem.example.index for problem in member.next_problems()])
    pack.close()
    assert order[0] == order[1] != order[2]


def _reports(recipe: Recipe, run: RunDir, count: int | None = None) -> list[StepReport]:
    with Trainer(recipe) as trainer:
        return list(islice(train(trainer, recipe, run), count))


@pytest.mark.parametrize(("mode", "first"), [("latest", 3), ("none", 0), ("null", 0)])
def test_a_run_resumes_or_starts_from_scratch(
    small_recipe: MakeRecipe, new_run: MakeRun, mode: str, first: int
) -> None:
    run = new_run(small_recipe(), "run")
    before = _reports(small_recipe(), run, 4)
    assert [report.step for report in before] == [0, 1, 2, 3]
    after = _reports(small_recipe(f"trainer.resume_mode={mode}"), run, 1)
    assert [report.step for report in after] == [first]
    assert [row["step"] for row in MetricsFile(run.metrics).rows()] == list(range(first + 1))
    if first:
        assert after[0].metrics["reward"] == before[3].metrics["reward"]
