"""Run `harness.reproduce` on real runs.

Results must be identical where promised, and tampering must be named where it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import reproduce, run
from harness.config import recipe as recipes
from harness.config.digest import recipe_digest
from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.core.paths import PROJECT
from harness.records.files import write_json
from harness.records.run_dir import RunDir, Status
from rltrain import worker_group
from rltrain.trainer import Trainer
from tests.integration.training import MakeRecipe, MakeRun, rows

Capture = pytest.CaptureFixture[str]

LEARNS = "trainer.policy.optimizer_config.lr=3e-3"
PPO = ["trainer.algorithm.advantage_estimator=gae", "trainer.critic.optimizer_config.lr=1e-3"]
FULL = ["trainer.policy.model.lora.rank=0", "trainer.policy.model.lora.sync=merge"]
RANKS = [
    "generator.backend=vllm",
    "trainer.placement.policy_num_gpus_per_node=2",
    "generator.num_inference_engines=2",
]


@pytest.fixture
def train(small_recipe: MakeRecipe, new_run: MakeRun) -> Callable[..., RunDir]:
    """Return a function that trains a small run; with `reports` it is killed after that many."""

    def make(*overrides: str, name: str = "run", reports: int | None = None) -> RunDir:
        recipe = small_recipe("trainer.num_threads=1", LEARNS, *overrides)
        run_dir = new_run(recipe, name)
        resume(recipe, run_dir, reports)
        return run_dir

    return make


def resume(recipe: Recipe, run_dir: RunDir, reports: int | None = None) -> None:
    with contextlib.closing(cast(Any, worker_group.train_run(recipe, run_dir))) as training:
        for _ in islice(training, reports):
            pass


def reproduced(run_dir: RunDir, *options: str) -> int:
    """Return the command's exit status; the repetition is written beside the run."""
    return reproduce.main([str(run_dir.path), "--output", str(again(run_dir).path), *options])


def again(run_dir: RunDir) -> RunDir:
    return RunDir(run_dir.path.with_name(f"{run_dir.path.name}-again"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "overrides",
    [[], pytest.param(PPO, marks=pytest.mark.slow), pytest.param(FULL, marks=pytest.mark.slow)],
    ids=["GRPO", "PPO", "full fine-tuning"],
)
def test_a_run_is_reproduced_to_the_bit(
    train: Callable[..., RunDir], capsys: Capture, overrides: list[str]
) -> None:
    run_dir = train(*overrides)
    before = tree(run_dir.path)
    assert reproduced(run_dir) == 0
    assert tree(run_dir.path) == before
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("identical: 5 rows of metrics, 36 completions, weights best and final  ")
    assert rows(again(run_dir)) == rows(run_dir)
    one, two = (recipes.read(each.recipe) for each in (run_dir, again(run_dir)))
    assert recipe_digest(one) == recipe_digest(two)
    record = again(run_dir).read_manifest()
    assert record["status"] == "COMPLETE"
    assert record["reproduces"]["verdict"].startswith("identical")
    # The runs learned something: two runs of nothing would be equal too.
    assert len({row["grad_norm"] for row in rows(run_dir) if row.get("grad_norm")}) >= 2


def test_threads_of_the_environment_do_not_matter(train: Callable[..., RunDir]) -> None:
    run_dir = train()
    command = [
        sys.executable,
        "-m",
        "harness.reproduce",
        str(run_dir.path),
        "--output",
        str(again(run_dir).path),
    ]
    threads = {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"}
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nidentical: " in done.stdout
    assert "step 4/4" in done.stdout
    assert "ETA" in done.stdout


@pytest.mark.parametrize("reports", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_run_that_was_killed_and_resumed_is_reproduced(
    train: Callable[..., RunDir], capsys: Capture, reports: int
) -> None:
    run_dir = train(reports=reports)
    assert run.main(["--resume", str(run_dir.path)]) == 0
    assert reproduced(run_dir) == 0
    output = capsys.readouterr().out
    assert "identical: 5 rows of metrics, 36 completions, weights best and final" in output
    (entry,) = run_dir.read_manifest()["resumed"]
    assert entry["command"]


def test_an_unfinished_run_is_compared_up_to_its_last_step(
    train: Callable[..., RunDir], capsys: Capture
) -> None:
    run_dir = train(reports=4)
    # Killed before it logged step 4, whose evaluation was on disk.
    run_dir.eval_samples(4).write_bytes(run_dir.eval_samples(2).read_bytes())
    assert reproduced(run_dir) == 0
    output = capsys.readouterr().out
    assert "RUNNING, up to step 3" in output
    assert "the run is RUNNING: compared up to step 3, the last it logged; no weights" in output
    assert "identical: 4 rows of metrics, 24 completions, no weights" in output
    assert again(run_dir).status is Status.PRUNED
    assert [row["step"] for row in rows(again(run_dir))] == [0, 1, 2, 3]


def test_a_run_from_another_runs_checkpoint_is_reproduced(
    train: Callable[..., RunDir], capsys: Capture
) -> None:
    first = train("trainer.max_steps=2", name="first")
    run_dir = train(f"trainer.resume_mode={first.checkpoints / 'step_000002'}")
    assert reproduced(run_dir) == 0
    assert "identical: 2 rows of metrics" in capsys.readouterr().out


def test_a_changed_metric_is_named(train: Callable[..., RunDir], capsys: Capture) -> None:
    run_dir = train()
    lines = run_dir.metrics.read_text().splitlines(keepends=True)
    row = json.loads(lines[3])
    run_dir.metrics.write_text(
        "".join(
            [
                *lines[:3],
                json.dumps(row | {"kl": 0.5, "reward": row["reward"] + 0.25}) + "\n",
                *lines[4:],
            ]
        )
    )
    assert reproduced(run_dir) == 1
    out = capsys.readouterr().out.splitlines()
    message = (
        f"departs at step 3: reward {row['reward'] + 0.25:.9g} -> {row['reward']:.9g} (by 0.25)"
    )
    assert message in out  # printed at once, while the repetition is running
    assert out[-1].startswith(f"{message}; differences in all: 2")
    assert again(run_dir).status is Status.COMPLETE


def test_the_repetition_may_stop_at_the_first_difference(
    train: Callable[..., RunDir], capsys: Capture
) -> None:
    run_dir = train()
    run_dir.recipe.write_text(
        recipes.to_yaml(recipes.with_values(recipes.read(run_dir.recipe), {"seed": 1}))
    )
    assert reproduced(run_dir, "--stop-at-departure") == 1
    output = capsys.readouterr().out
    assert "differs: recipe: " in output
    assert [row["step"] for row in rows(again(run_dir))] == [0]
    assert again(run_dir).status is Status.PRUNED
    assert again(run_dir).read_manifest()["reproduces"]["verdict"].startswith("departs at step 0: ")


def test_a_changed_adapter_is_named(train: Callable[..., RunDir], capsys: Capture) -> None:
    run_dir = train()
    file = run_dir.adapter / "final" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[5]
    tensors[name].view(-1)[7] += 2.0**-10
    save_file(tensors, file)
    assert reproduced(run_dir) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"departs at step 4: weights final: {name} ")
    assert "(by 0.000977); differences in all: 1" in last


def test_a_difference_within_the_tolerance_is_equal(
    train: Callable[..., RunDir], capsys: Capture
) -> None:
    run_dir = train()
    lines = run_dir.metrics.read_text().splitlines(keepends=True)
    row = json.loads(lines[2])
    run_dir.metrics.write_text(
        "".join(
            [*lines[:2], json.dumps(row | {"entropy": row["entropy"] + 1e-7}) + "\n", *lines[3:]]
        )
    )
    assert reproduced(run_dir, "--tolerance", "1e-6") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("equal within 1")
    assert "(largest difference: step 2, entropy)" in last


def test_changed_data_and_packages_are_named_first(
    train: Callable[..., RunDir], capsys: Capture, tmp_path: Path, small_recipe: MakeRecipe
) -> None:
    (source,) = small_recipe().data.train_data
    data = tmp_path / "train.parquet"
    pd.read_parquet(source).to_parquet(data)
    run_dir = train(f"data.train_data=[{data}]")
    record = run_dir.read_manifest()
    record["packages"]["torch"] = "0.0.1"
    write_json(run_dir.manifest, record)
    pd.read_parquet(data).iloc[::-1].to_parquet(data)
    assert reproduced(run_dir) == 1
    output = capsys.readouterr().out
    assert f"  differs: torch: 0.0.1 -> {torch.__version__}\n" in output
    assert f"  differs: data {data}: sha256:" in output
    assert "departs at step 1: " in output


@pytest.mark.parametrize(
    ("calls", "error", "message"),
    [
        (4, LookupError("no such word"), "failed after step 3 of 4: LookupError: no such word"),
        (
            0,
            OSError(28, "No space left on device"),
            "failed before its first step: OSError: [Errno 28] No space left",
        ),
        (4, UserError("the disk is gone"), "failed after step 3 of 4: the disk is gone"),
    ],
)
def test_a_failed_repetition_says_where_and_why(
    train: Callable[..., RunDir],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
    error: Exception,
    message: str,
) -> None:
    run_dir, write, calls_made = train(), Trainer._record, [0]

    def failing(*arguments: Any) -> Any:
        calls_made[0] += 1
        if calls_made[0] > calls:
            raise error
        return write(*arguments)

    monkeypatch.setattr(Trainer, "_record", failing)
    assert reproduced(run_dir) == 4
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith(message)
    assert "Traceback" not in captured.out + captured.err
    assert f"in {again(run_dir).log}" in captured.err
    record = again(run_dir).read_manifest()
    # A full disk is the machine's failure: the repetition can be resumed.
    status = "RUNNING" if isinstance(error, OSError) else "FAILED"
    assert (record["status"], record["reproduces"]["verdict"]) == (
        status,
        captured.out.splitlines()[-1].split("  ")[0],
    )
    assert "raise error" in again(run_dir).log.read_text()
    assert len(rows(again(run_dir))) == calls


def test_bad_input_found_while_loading_is_an_error(
    train: Callable[..., RunDir], tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    run_dir = train(f"trainer.policy.model.path={model}", "trainer.max_steps=1")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(UserError):
        reproduced(run_dir)
    assert again(run_dir).status is Status.FAILED


def test_a_new_run_with_the_recipe_of_a_run(
    train: Callable[..., RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run_dir = train("seed=5")
    root = f"trainer.ckpt_path={tmp_path / 'runs'}"
    assert run.main(["--from", str(run_dir.path), root]) == 0
    assert (
        run.main(
            ["--from", str(run_dir.path), root, "trainer.run_name=other", "trainer.max_steps=2"]
        )
        == 0
    )
    same, other = sorted((tmp_path / "runs").iterdir(), key=lambda folder: folder.name == "other")
    assert same.name.startswith("run-")
    assert rows(RunDir(same)) == rows(run_dir)
    assert (
        RunDir(same).read_manifest()["recipe"]["digest"]
        == run_dir.read_manifest()["recipe"]["digest"]
    )
    record = RunDir(other).read_manifest()
    assert record["recipe"]["source"] == str(run_dir.recipe)
    assert record["recipe"]["overrides"][-1] == "trainer.max_steps=2"
    assert record["seed"] == 5
    assert rows(RunDir(other))[1] == rows(run_dir)[1]
    assert len(rows(RunDir(other))) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [["generator.backend=vllm"], RANKS], ids=["vLLM", "two ranks with vLLM"]
)
def test_a_vllm_run_is_reproduced(
    train: Callable[..., RunDir], capsys: Capture, overrides: list[str]
) -> None:
    run_dir = train(*overrides, "trainer.max_steps=2")
    assert reproduced(run_dir) == 0
    assert (
        "identical: 3 rows of metrics, 24 completions, weights best and final"
        in capsys.readouterr().out
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_repeats_itself_and_its_trials_are_reproduced_outside_ray(
    small_data: list[str], tmp_path: Path, capsys: Capture
) -> None:
    # One trial completes, and one is pruned at step 2. The engine pads both ranks alike.
    space = "sweep.space={trainer.policy.model.lora.rank:{choices:[2,4]},trainer.max_steps:{choices:[2,4]}}"  # noqa: E501
    overrides = [
        *small_data,
        LEARNS,
        f"trainer.ckpt_path={tmp_path}",
        space,
        "sweep.first_trials=[]",
        "sweep.num_trials=4",
        "sweep.max_concurrent=1",
        "sweep.seeds=[0]",
        "sweep.sampler=grid",
        "sweep.pruner=null",
        "sweep.pruner={name:threshold,lower:2.0}",
        "sweep.space.trainer.policy.model.lora.alpha=null",
        "sweep.space.trainer.policy.optimizer_config.lr=null",
    ]
    for name in ("one", "two"):
        command = [
            sys.executable,
            "-m",
            "harness.sweep",
            "quickstart",
            *overrides,
            f"trainer.run_name={name}",
        ]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (
        [RunDir(trial) for trial in sorted((tmp_path / name / "trials").iterdir())]
        for name in ("one", "two")
    )
    statuses = [trial.status for trial in one]
    assert {Status.COMPLETE, Status.PRUNED} == set(statuses)
    assert [trial.read_manifest()["trial"] for trial in one] == [
        trial.read_manifest()["trial"] for trial in two
    ]
    assert [rows(trial) for trial in one] == [rows(trial) for trial in two]
    for status in (Status.COMPLETE, Status.PRUNED):
        trial = one[statuses.index(status)]
        assert (
            reproduce.main([str(trial.path), "--output", str(tmp_path / f"again-{status.value}")])
            == 0
        )
        assert "identical: " in capsys.readouterr().out
    with pytest.raises(UserError, match="name a trial"):
        reproduce.main([str(tmp_path / "one")])
