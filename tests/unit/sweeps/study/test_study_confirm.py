"""Test confirmation runs: which and when, and that nothing learns from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweeps.study.study import Study, Trial
from tests.unit.sweeps.curves import LR, RANK, STEPS
from tests.unit.sweeps.study.test_study import study_of


def fill(study: Study, score: Callable[[Trial], float], most: int = 1000) -> list[Trial]:
    """Complete the trials that the study asks for, one after the other, and return them."""
    done: list[Trial] = []
    while len(done) < most and (trial := study.ask()) is not None:
        study.complete(trial.number, score(trial), STEPS)
        done.append(trial)
    return done


def by_rank(trial: Trial) -> float:
    """Return a score: rank 8 is best, then 32, then 1; seeds differ a little."""
    return {8: 0.8, 32: 0.7, 1: 0.6}[trial.params[RANK]] + trial.seed / 1000


def test_the_best_are_run_again_on_fresh_seeds(tmp_path: Path) -> None:
    space = {RANK: {"choices": [1, 8, 32]}}
    settings: dict[str, Any] = {"sampler": "grid", "num_trials": 3, "seeds": [0, 4]}
    study = study_of(tmp_path, space, **settings)
    study.confirm_best(2)
    assert study.num_left == 6  # it is not known yet which to confirm
    done = fill(study, by_rank)
    assert [trial.confirm for trial in done] == [False] * 6 + [True] * 4
    again = [
        (trial.number, trial.configuration, trial.params[RANK], trial.seed) for trial in done[6:]
    ]
    assert again == [(6, 1, 8, 5), (7, 1, 8, 6), (8, 2, 32, 5), (9, 2, 32, 6)]
    assert [trial.run_dir for trial in done[6:8]] == ["trials/0006", "trials/0007"]
    assert (study.num_left, study.num_runs, study.finished) == (0, 10, True)
    assert study_of(tmp_path, space, **settings).finished


def test_one_seed_is_confirmed_on_two(tmp_path: Path) -> None:
    study = study_of(tmp_path, {RANK: {"choices": [1, 8]}}, sampler="grid", num_trials=2, seeds=[3])
    study.confirm_best(1)
    assert [trial.seed for trial in fill(study, by_rank)] == [3, 3, 4, 5]


def test_the_lowest_loss_is_confirmed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "sampler": "grid",
        "num_trials": 3,
        "metric": "eval/clipped_ratio",
        "seeds": [0, 1],
    }
    study = study_of(tmp_path, {RANK: {"choices": [1, 8, 32]}}, **settings)
    study.confirm_best(1)
    assert {trial.params[RANK] for trial in fill(study, by_rank) if trial.confirm} == {1}


def test_nothing_is_confirmed_before_the_last_trial_has_ended(tmp_path: Path) -> None:
    study = study_of(
        tmp_path, {RANK: {"choices": [1, 8]}}, sampler="grid", num_trials=2, seeds=[0, 1]
    )
    study.confirm_best(1)
    *first, last = (study.ask() for _ in range(4))
    for trial in first:
        assert trial is not None
        study.complete(trial.number, by_rank(trial), STEPS)
    assert study.ask() is None
    assert not study.finished
    assert last is not None
    study.fail(last.number, "no luck")
    # Rank 8 lacks a seed: only a configuration with all seeds can be among the best.
    assert [trial.params[RANK] for trial in fill(study, by_rank)] == [1, 1]


def test_sampler_and_pruner_ignore_confirmation_runs(tmp_path: Path) -> None:
    def walk(folder: Path, confirm: int) -> list[Any]:
        settings: dict[str, Any] = {
            "sampler": "tpe",
            "pruner": {"name": "median", "n_startup_trials": 5},
        }
        for num_trials, best in ((4, confirm), (12, 0)):
            study = study_of(folder, num_trials=num_trials, **settings)
            if best:
                study.confirm_best(best)
            seen: list[Any] = []
            while (trial := study.ask()) is not None:
                # Confirmation runs are far better early on: with them the pruner would stop all
                # other trials.
                pruned = study.report(trial.number, 1, 0.9 if trial.confirm else trial.params[LR])
                study.complete(
                    trial.number, 0.99 if trial.confirm else trial.params[LR] * 50, STEPS
                )
                seen += [] if trial.confirm else [(trial.params, pruned)]
        return seen

    seen = walk(tmp_path / "confirmed", 3)
    assert len(seen) == 8
    assert seen == walk(tmp_path / "plain", 0)


def test_a_sweep_goes_on_after_it_was_confirmed(tmp_path: Path) -> None:
    space, settings = {RANK: {"choices": [1, 8, 32]}}, {"sampler": "grid", "seeds": [0, 1]}
    first = study_of(tmp_path, space, num_trials=1, first_trials=[{RANK: 1}], **settings)
    first.confirm_best(1)
    assert [trial.seed for trial in fill(first, by_rank)] == [0, 1, 2, 3]
    longer = study_of(tmp_path, space, num_trials=3, first_trials=[{RANK: 1}], **settings)
    assert longer.num_to_confirm == 1
    done = fill(longer, by_rank)
    assert [(t.number, t.configuration, t.seed, t.confirm) for t in done] == [
        (4, 1, 0, False),
        (5, 1, 1, False),
        (6, 2, 0, False),
        (7, 2, 1, False),
        (8, 1, 2, True),
        (9, 1, 3, True),
    ]
    assert longer.best is not None
    assert longer.best[0].number == 5
    assert longer.num_left == 0


def test_a_kill_while_confirming_repeats_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sampler": "grid", "num_trials": 2, "seeds": [0, 1]}
    space = {RANK: {"choices": [1, 8]}}
    study = study_of(tmp_path, space, **settings)
    study.confirm_best(2)
    fill(study, by_rank, most=5)
    running = study.ask()
    again = study_of(tmp_path, space, **settings)  # the process dies here
    assert again.ask() == running
    assert running is not None
    assert (running.number, running.confirm) == (5, True)
    again.complete(running.number, 0.5, STEPS)
    assert [(t.number, t.configuration, t.seed) for t in fill(again, by_rank)] == [
        (6, 0, 2),
        (7, 0, 3),
    ]


def test_outdated_trials_are_ignored(tmp_path: Path) -> None:
    """Their scores belong to another experiment, so pruner, sampler and `best` ignore them."""
    settings: dict[str, Any] = {
        "sampler": "grid",
        "num_trials": 3,
        "seeds": [0, 1],
        "pruner": {"name": "median", "n_startup_trials": 1},
    }
    space = {RANK: {"choices": [1, 8, 32]}}
    study = study_of(tmp_path, space, **settings)
    for trial in fill(study, by_rank, most=4):
        assert trial.params[RANK] in (1, 8)
    study.outdated = frozenset({0, 1, 2, 3})
    assert study.best is None
    assert [(o.params[RANK], o.value) for o in study._history()] == [(1, None), (8, None)]
    asked = study.ask()
    assert asked is not None
    assert asked.params[RANK] == 32  # earlier configurations are not tried again
    assert study.report(asked.number, STEPS, 0.1) is None
    study.complete(asked.number, 0.1, STEPS)
    fill(study, by_rank)
    study.confirm_best(1)
    assert {trial.params[RANK] for trial in fill(study, by_rank)} == {32}
    # The same evaluation is pruned where the outdated trials count.
    again = study_of(tmp_path / "again", space, **settings)
    fill(again, by_rank, most=4)
    asked = again.ask()
    assert asked is not None
    assert again.report(asked.number, STEPS, 0.1) is not None
