"""Test the study on its journal: numbering, pruning, failures and resumption."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from harness.core.errors import UserError
from harness.core.paths import PROJECT
from sweeps.study import plan as plans
from sweeps.study.space import identity
from sweeps.study.study import Study, Trial
from tests.unit.sweeps.curves import ALPHA, LR, RANK, TARGETS, recipe_of


def study_of(folder: Path, space: dict[str, Any] | None = None, **sweep: Any) -> Study:
    return Study(folder / "study.journal", plans.build(recipe_of(space, **sweep)))


def ask_all(study: Study) -> list[Trial]:
    asked = []
    while (trial := study.ask()) is not None:
        asked.append(trial)
    return asked


def test_every_configuration_runs_with_every_seed(tmp_path: Path) -> None:
    asked = ask_all(study_of(tmp_path, num_trials=3, seeds=[5, 7]))
    assert [(t.number, t.configuration, t.seed) for t in asked] == [
        (0, 0, 5),
        (1, 0, 7),
        (2, 1, 5),
        (3, 1, 7),
        (4, 2, 5),
        (5, 2, 7),
    ]
    assert [t.run_dir for t in asked[:2]] == ["trials/0000", "trials/0001"]
    assert asked[0].params == asked[1].params
    assert len({identity(t.params) for t in asked}) == 3


@pytest.mark.parametrize(
    ("sampler", "first", "shown"), [("random", 0, 9), ("tpe", 0, 3), ("tpe", 4, 4)]
)
def test_the_preview_is_what_the_study_asks_whatever_the_results(
    sampler: str, first: int, shown: int, tmp_path: Path
) -> None:
    first_trials = [
        {RANK: 8, LR: lr, TARGETS: "all-linear"} for lr in (1e-5, 1e-4, 1e-3, 1e-2)[:first]
    ]
    for results in ([0.5] * 9, [i / 10 for i in range(9)]):
        study = study_of(
            tmp_path / str(results[0]), sampler=sampler, num_trials=9, first_trials=first_trials
        )
        asked = []
        for value in results:
            trial = study.ask()
            assert trial is not None
            asked.append(trial.params)
            study.complete(trial.number, value, 4)
        preview = plans.preview(study.plan, 20)
        assert len(preview) == shown
        assert asked[:shown] == preview


def test_optuna_reads_the_journal(tmp_path: Path) -> None:
    study = study_of(tmp_path, num_trials=2)
    done, failed = study.ask(), study.ask()
    assert done is not None
    assert failed is not None
    study.complete(done.number, 0.75, 4)
    study.fail(failed.number, "ValueError: no luck")
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal"))
    read = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert read.best_value == 0.75
    assert read.trials[1].state is TrialState.FAIL
    assert read.trials[1].user_attrs["reason"] == "ValueError: no luck"
    assert read.trials[0].params[TARGETS] in ("all-linear", '["q_proj", "v_proj"]')


def test_a_pruned_trial_is_pruned_and_never_complete(tmp_path: Path) -> None:
    study = study_of(tmp_path, pruner={"name": "median", "n_startup_trials": 1})
    good, bad = study.ask(), study.ask()
    assert good is not None
    assert bad is not None
    assert study.report(good.number, 1, 0.9) is None
    study.complete(good.number, 0.95, 4)
    reason = study.report(bad.number, 1, 0.3125)
    assert reason == "pruned at step 1: eval/accuracy 0.3125 by MedianPruner"
    assert study.report(bad.number, 2, 0.4) is None
    record = study.trials()[bad.number]
    assert (record.state, record.value, record.user_attrs["reason"]) == (
        TrialState.PRUNED,
        0.3125,
        reason,
    )
    study.complete(bad.number, 0.99, 4)
    assert study.trials()[bad.number].state is TrialState.PRUNED
    assert study.best is not None
    assert study.best[0].number == good.number


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_trial_without_a_finite_metric_fails(tmp_path: Path, value: float | None) -> None:
    study = study_of(tmp_path)
    trial = study.ask()
    assert trial is not None
    if value is not None:
        assert study.report(trial.number, 1, value) is None
    reason = study.complete(trial.number, value, 4)
    assert reason is not None
    assert "eval/accuracy" in reason
    assert study.trials()[0].state is TrialState.FAIL
    assert study.best is None


def test_the_best_trial_follows_the_metrics_direction(tmp_path: Path) -> None:
    study = study_of(tmp_path, metric="eval/clipped_ratio", num_trials=2)
    for value in (0.5, 0.25):
        trial = study.ask()
        assert trial is not None
        study.complete(trial.number, value, 4)
    assert study.best is not None
    assert study.best[1] == 0.25


def test_resume_issues_interrupted_trials_again_and_repeats_none(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_trials": 12, "sampler": "tpe"}
    study = study_of(tmp_path, **settings)
    first = [study.ask() for _ in range(3)]
    assert first[0] is not None
    study.complete(first[0].number, 0.5, 4)
    again = study_of(tmp_path, **settings)
    assert [again.ask(), again.ask()] == first[1:]
    rest = ask_all(again)
    assert [trial.number for trial in rest] == list(range(3, 12))
    everything = [trial for trial in (*first, *rest) if trial is not None]
    assert len({identity(trial.params) for trial in everything}) == 12


def test_a_resumed_sweep_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def walk(folder: Path, trials_per_process: int) -> list[Any]:
        seen: list[Any] = []
        while True:
            study = study_of(folder, sampler="tpe", num_trials=14)
            for _ in range(trials_per_process):
                trial = study.ask()
                if trial is None:
                    return seen
                study.complete(trial.number, trial.params[LR] * 50, 4)
                seen.append(trial.params)
            study.ask()  # the process dies here, with this trial running

    assert walk(tmp_path / "whole", 100) == walk(tmp_path / "parts", 3)


def test_an_evaluation_reported_before_the_kill_is_not_reported_twice(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    trial = study.ask()
    assert trial is not None
    study.report(trial.number, 1, 0.5)
    again = study_of(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.report(trial.number, 1, 0.5)
        again.report(trial.number, 2, 0.6)
        again.complete(trial.number, 0.6, 2)
    assert again.trials()[0].intermediate_values == {1: 0.5, 2: 0.6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": {RANK: {"choices": [1, 8]}}}, f"{RANK}: choices: 1, 8, 32 -> choices: 1, 8"),
        (
            {"space": {RANK: {"choices": [1, 8, 32]}, ALPHA: {"choices": [8, 16]}}},
            f"{ALPHA}: no axis -> choices: 8, 16",
        ),
        ({"metric": "reward"}, "sweep.metric: eval/accuracy -> reward"),
        ({"seeds": [0, 1]}, "sweep.seeds: [0] -> [0, 1]"),
    ],
)
def test_another_sweep_is_not_resumed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    space = {RANK: {"choices": [1, 8, 32]}}
    study_of(tmp_path, space).ask()
    with pytest.raises(UserError) as caught:
        study_of(tmp_path, **{"space": space, **change})
    assert message in str(caught.value)
    # More trials of the same space are allowed.
    assert study_of(tmp_path, space, num_trials=99).ask() is not None


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    trial = study.ask()
    assert trial is not None
    study.complete(trial.number, 0.5, 4)
    with (tmp_path / "study.journal").open("a") as file:
        file.write('{"op_code":4,"worker_id":"x","study_id":0,"sta')
    again = study_of(tmp_path)
    second = again.ask()
    assert second is not None
    assert second.number == 1
    assert [record.state for record in study_of(tmp_path).trials()] == [
        TrialState.COMPLETE,
        TrialState.RUNNING,
    ]


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from harness.core.locks import KernelLock\n"
        "KernelLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(600)"
    )
    lock = tmp_path / "study.journal.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    from harness.core.locks import held

    with held(lock) as owned:
        assert not owned
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    assert study_of(tmp_path).ask() is not None
    # Optuna's locks are released only after 30 seconds.
    assert time.monotonic() - began < 25


def test_a_finite_space_runs_out(tmp_path: Path) -> None:
    space = {
        "trainer.train_batch_size": {"choices": [128, 192]},
        "trainer.policy_mini_batch_size": {"choices": [64, 128]},
    }
    study = study_of(tmp_path, space, num_trials=4, seeds=[0, 1])
    assert not study.exhausted
    asked = [study.ask() for _ in range(5)]
    assert not study.exhausted  # the third configuration has a seed left
    asked += ask_all(study)
    assert len(asked) == 6
    assert study.exhausted
    assert not study.finished
    again = study_of(tmp_path, space, num_trials=4, seeds=[0, 1])
    assert ask_all(again) == asked
    for trial in asked:
        assert trial is not None
        again.complete(trial.number, 0.5, 4)
    assert again.finished


def test_samplers_see_a_configurations_mean_over_seeds(tmp_path: Path) -> None:
    study = study_of(tmp_path, num_trials=3, seeds=[0, 1])
    for value in (0.4, 0.8):
        trial = study.ask()
        assert trial is not None
        study.complete(trial.number, value, 4)
    assert study.ask() is not None
    first, second = study._history()
    assert first.state is TrialState.COMPLETE
    assert first.value == pytest.approx(0.6)
    assert second.state is TrialState.RUNNING


def test_a_configuration_with_a_pruned_seed_is_pruned(
    tmp_path: Path,
) -> None:
    study = study_of(tmp_path, num_trials=3, seeds=[0, 1])
    first, second = study.ask(), study.ask()
    assert first is not None
    assert second is not None
    study.complete(first.number, 0.9, 4)
    assert study.report(second.number, 1, 0.2) is None
    study._finish(second.number, TrialState.PRUNED, reason="stopped early")
    (seen,) = study._history()
    assert (seen.state, seen.value, seen.intermediate) == (TrialState.PRUNED, 0.2, {1: 0.2})
