"""Test trials' recipes, directories and rerun overrides, and their recovery after a kill."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from optuna.trial import TrialState

from harness import run
from harness.config import recipe as recipes
from harness.config.digest import recipe_digest
from harness.core.errors import UserError
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import Status
from sweeps.study import trials
from sweeps.study.study import Study
from tests.unit.sweeps.curves import ALPHA, LR, RANK, TARGETS, begin, recipe_of


def test_a_trial_is_a_run_that_its_overrides_make_again(tmp_path: Path) -> None:
    space = {
        RANK: {"choices": [1, 8]},
        LR: {"low": 1e-5, "high": 1e-2, "log": True},
        ALPHA: {"choices": [16, 32]},
        TARGETS: {"choices": [["q_proj", "v_proj"], ["k_proj"]]},
        "generator.sampling_params.temperature": {"choices": [0.7, 1.0]},
        "trainer.strategy": {"choices": ["fsdp2"]},
    }
    overrides_of_sweep = [
        "trainer.policy.model.path=rltrain",
        "trainer.max_steps=3",
        "seed=7",
        "trainer.run_name=x",
        f"{RANK}=4",
        "sweep.num_trials=2",
    ]
    recipe = recipes.with_values(
        recipes.load("base", overrides_of_sweep),
        {"sweep": {"num_trials": 2, "seeds": [3], "space": space}},
    )
    plan, sweep_dir = begin(recipe, tmp_path)
    sweep_dir.update(recipe={"source": "recipes/base.yaml", "overrides": overrides_of_sweep})
    study = Study(sweep_dir.journal, plan)
    for _ in range(2):
        trial = study.ask()
        assert trial is not None
        run_dir, created = trials.create(plan, trial, sweep_dir)
        manifest = run_dir.read_manifest()
        assert manifest["kind"] == "trial"
        assert manifest["trial"] == {
            "number": trial.number,
            "configuration": trial.configuration,
            "seed": 3,
            "params": trial.params,
            "confirm": False,
        }
        overrides = manifest["recipe"]["overrides"]
        assert not any(override.startswith(("sweep", "trainer.run_name")) for override in overrides)
        again = recipes.load("recipes/base.yaml", overrides)
        assert recipe_digest(again) == manifest["recipe"]["digest"]
        assert recipes.read(run_dir.recipe) == created
        assert created.sweep is None
        assert created.seed == 3
        assert created.trainer.target_modules == trial.params[TARGETS]
        assert Path(created.trainer.ckpt_path) / str(created.trainer.run_name) == run_dir.path


def test_an_interrupted_trials_directory_is_kept(tmp_path: Path) -> None:
    plan, sweep_dir = begin(recipe_of(), tmp_path)
    trial = Study(sweep_dir.journal, plan).ask()
    assert trial is not None
    run_dir, recipe = trials.create(plan, trial, sweep_dir)
    run_dir.move_to(Status.RUNNING)
    assert trials.create(plan, trial, sweep_dir)[1] == recipe
    assert run_dir.status is Status.RUNNING


def test_reconcile_study_and_directories_after_a_kill(tmp_path: Path) -> None:
    plan, sweep_dir = begin(recipe_of(num_trials=6), tmp_path)
    study = Study(sweep_dir.journal, plan)
    asked = [study.ask() for _ in range(6)]
    run_dirs = [
        trials.create(plan, trial, sweep_dir)[0] for trial in asked[:5] if trial is not None
    ]
    for run_dir in run_dirs:
        run_dir.move_to(Status.RUNNING)
    # Each was killed at another moment: 0 had finished, 1 had failed, 2 was pruned, 3 had failed
    # in the study only, 4 was training, and 5 has no directory yet.
    MetricsFile(run_dirs[0].metrics).append({"step": 4, "eval/accuracy": 0.5})
    run_dirs[0].move_to(Status.COMPLETE)
    run_dirs[1].move_to(Status.FAILED, reason="ValueError: no luck")
    study._finish(2, TrialState.PRUNED, reason="pruned at step 1")
    study.fail(3, "it died")
    again = Study(sweep_dir.journal, plan)
    trials.reconcile(again, sweep_dir)
    states = [record.state.name for record in again.trials()]
    assert states == ["COMPLETE", "FAIL", "PRUNED", "FAIL", "RUNNING", "RUNNING"]
    assert again.trials()[0].value == 0.5
    assert again.trials()[1].user_attrs["reason"] == "ValueError: no luck"
    assert [run_dir.status.value for run_dir in run_dirs] == [
        "COMPLETE",
        "FAILED",
        "PRUNED",
        "FAILED",
        "RUNNING",
    ]
    assert run_dirs[2].read_manifest()["reason"] == "pruned at step 1"
    assert [trial and trial.number for trial in (again.ask(), again.ask(), again.ask())] == [
        4,
        5,
        None,
    ]


def test_an_evaluation_logged_before_a_kill_reaches_the_study_and_its_pruner(
    tmp_path: Path,
) -> None:
    plan, sweep_dir = begin(
        recipe_of(num_trials=3, pruner={"name": "threshold", "lower": 0.25}), tmp_path
    )
    study = Study(sweep_dir.journal, plan)
    asked = [study.ask() for _ in range(3)]
    run_dirs = [trials.create(plan, trial, sweep_dir)[0] for trial in asked if trial is not None]
    for run_dir, value in zip(run_dirs, (0.5, 0.125, 0.75), strict=True):
        run_dir.move_to(Status.RUNNING)
        for step in range(3):
            MetricsFile(run_dir.metrics).append({"step": step, "eval/accuracy": value})
    study.report(0, 1, 0.5)
    with run_dirs[2].metrics.open("a") as file:
        file.write("garbage\n")
    again = Study(sweep_dir.journal, plan)
    trials.reconcile(again, sweep_dir)
    first, second, third = again.trials()
    assert first.intermediate_values == {1: 0.5, 2: 0.5}
    assert (second.state, second.intermediate_values) == (TrialState.PRUNED, {1: 0.125})
    assert run_dirs[1].status is Status.PRUNED
    assert (third.state, third.intermediate_values) == (TrialState.RUNNING, {})


def test_a_directory_records_that_the_value_is_not_finite(tmp_path: Path) -> None:
    plan, sweep_dir = begin(recipe_of(num_trials=2), tmp_path)
    study = Study(sweep_dir.journal, plan)
    asked = [study.ask() for _ in range(2)]
    run_dirs = [trials.create(plan, trial, sweep_dir)[0] for trial in asked if trial is not None]
    for run_dir in run_dirs:
        run_dir.move_to(Status.RUNNING)
        MetricsFile(run_dir.metrics).append({"step": 4, "eval/accuracy": math.nan})
        run_dir.move_to(Status.COMPLETE)
    study.complete(0, math.nan, 4)  # killed before the directory records it
    trials.reconcile(Study(sweep_dir.journal, plan), sweep_dir)
    assert [run_dir.read_manifest()["reason"] for run_dir in run_dirs] == [
        "eval/accuracy is nan at step 4"
    ] * 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [(1, None), (2, "trials/0001: the study has no such trial"), (3, "trials/0001: the study has")],
)
def test_a_journal_that_lost_trials_is_refused(
    tmp_path: Path, lines: int, message: str | None
) -> None:
    plan, sweep_dir = begin(recipe_of(num_trials=4), tmp_path)
    study = Study(sweep_dir.journal, plan)
    asked = [study.ask() for _ in range(3)]
    for trial in asked:
        assert trial is not None
        trials.create(plan, trial, sweep_dir)[0].move_to(Status.RUNNING)
    sweep_dir.trial(1).move_to(Status.FAILED, reason="no luck")
    content = sweep_dir.journal.read_bytes().splitlines(keepends=True)
    sweep_dir.journal.write_bytes(b"".join(content[:-lines]))
    again = Study(sweep_dir.journal, plan)
    if message is not None:
        with pytest.raises(UserError, match=f"has lost lines\n.*{message}"):
            trials.reconcile(again, sweep_dir)
        return
    # A kill may cut off the last line: the study asks for the same trial again.
    trials.reconcile(again, sweep_dir)
    issued = [again.ask() for _ in range(2)]
    assert issued == [asked[0], asked[2]]
    other = dataclasses.replace(asked[2], seed=7) if asked[2] else None
    assert other is not None
    with pytest.raises(UserError, match="trials/0002: its seed differ"):
        trials.create(plan, other, sweep_dir)


def test_a_trial_is_resumed_only_with_its_sweep(tmp_path: Path) -> None:
    plan, sweep_dir = begin(recipe_of(), tmp_path / "sweep")
    trial = Study(sweep_dir.journal, plan).ask()
    assert trial is not None
    run_dir = trials.create(plan, trial, sweep_dir)[0]
    run_dir.move_to(Status.FAILED, reason="no luck")
    before = run_dir.manifest.read_bytes()
    for arguments in (
        ["--resume", str(run_dir.path)],
        ["--resume", str(run_dir.path), "trainer.num_threads=2"],
    ):
        with pytest.raises(UserError, match=f"harness.sweep --resume {sweep_dir.path}"):
            run.main(arguments)
    assert run_dir.manifest.read_bytes() == before
