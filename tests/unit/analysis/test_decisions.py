from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import reading
from analysis.decisions import Decision, decisions
from analysis.experiment import Experiment
from analysis.levels import contest
from analysis.next_step import next_step
from harness import recipe as recipes
from harness.rundir import Status
from harness.schema import Recipe
from sweeps import space
from tests.unit.analysis.synthetic import LR, RANK, TARGETS, Sweep, Trial, params, write_run, write_sweep

RNG = np.random.default_rng(7)


def runs(means: dict[tuple[int, float], float], seeds: int, noise: float = 0.01) -> pd.DataFrame:
    """A sweep's runs from the true score per rank and learning rate."""
    rows = [
        {"configuration": number, "seed": seed, "rank": rank, "full": rank == 0, LR: lr, RANK: rank, "confirm": False,
         "score": mean + RNG.normal(0, noise)}
        for number, ((rank, lr), mean) in enumerate(means.items())
        for seed in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def best(table: pd.DataFrame) -> int:
    return int(str(table.groupby("configuration")["score"].mean().idxmax()))


def test_equal_values_are_seldom_told_apart() -> None:
    """Three ranks with the same truth: the best of them is called better than another in at most about 5% of sweeps."""
    told = 0
    for _ in range(400):
        table = runs({(rank, lr): 0.8 if lr == 1e-3 else 0.5 for rank in (1, 8, 64) for lr in (1e-4, 1e-3, 1e-2)}, 3)
        found = contest(table, "rank", best(table), [LR], 0.3, maximize=True)
        assert found is not None
        told += bool(found.of("worse"))
    assert told <= 28, "two standard errors above 5%"


def test_a_clear_difference_is_found_and_a_small_one_is_as_good() -> None:
    table = runs({(1, 1e-3): 0.6, (8, 1e-3): 0.9, (64, 1e-3): 0.895, (8, 1e-4): 0.5}, 5, noise=0.003)
    found = contest(table, "rank", 1, [LR], 0.3, maximize=True)
    assert found is not None
    assert found.certain
    assert [(level.value, level.standing) for level in found.levels] == [(1, "worse"), (8, "chosen"), (64, "as good")]
    assert found.margin == pytest.approx(0.06, abs=0.002)


def test_lower_is_better_turns_it_round() -> None:
    table = runs({(1, 1e-3): 2.0, (8, 1e-3): 1.0}, 4)
    found = contest(table, "rank", 1, [LR], 3.0, maximize=False)
    assert found is not None
    assert [(level.value, level.standing) for level in found.levels] == [(1, "worse"), (8, "chosen")]
    ahead = found.levels[0].ahead
    assert ahead is not None
    assert ahead.value == pytest.approx(1.0, abs=0.05), "positive where the chosen one is better"


def test_a_value_that_was_never_tried_as_the_winner_was_is_not_judged() -> None:
    table = runs({(8, 1e-3): 0.9, (8, 1e-4): 0.5, (1, 1e-5): 0.3}, 3)
    found = contest(table, "rank", 0, [LR], 0.3, maximize=True)
    assert found is not None
    assert [(level.value, level.fair, level.standing) for level in found.levels] == [
        (1, False, "open"),
        (8, True, "chosen"),
    ]


def test_a_rank_that_came_with_other_target_modules_is_not_judged() -> None:
    """Attention at rank 12 has as many parameters as MLP at rank 8: modules are compared so, ranks are not."""
    rates = {1e-4: 0.4, 1e-3: 0.0, 1e-2: 0.4}  # less than the arm's best
    arms = [("mlp", 8, 100, 0.9), ("attention", 12, 101, 0.6), ("all-linear", 8, 150, 0.89)]
    table = pd.DataFrame(
        {"configuration": 3 * arm + place, "seed": seed, "rank": rank, "full": False, LR: lr, RANK: rank,
         "targets": modules, TARGETS: modules, "parameters": size, "confirm": False,
         "score": score - less + RNG.normal(0, 0.003)}
        for arm, (modules, rank, size, score) in enumerate(arms)
        for place, (lr, less) in enumerate(rates.items())
        for seed in range(3)
    )  # fmt: skip
    ranks = contest(table, "rank", 1, [LR, TARGETS], 0.3, maximize=True)
    modules = contest(table, "targets", 1, [LR, RANK], 0.3, maximize=True)
    assert ranks is not None
    assert modules is not None
    assert [(level.value, level.standing) for level in ranks.levels] == [(8, "chosen"), (12, "open")]
    assert {level.value: level.standing for level in modules.levels} == {
        "mlp": "chosen", "attention": "worse", "all-linear": "as good"
    }  # fmt: skip


def test_full_fine_tuning_is_judged_at_learning_rates_of_its_own() -> None:
    adapters = {(8, lr): 0.9 if lr == 1e-3 else 0.5 for lr in (1e-4, 1e-3, 1e-2)}
    once = runs({**adapters, (0, 1e-3): 0.1}, 3)
    found = contest(once, "rank", 1, [LR], 0.3, maximize=True)
    assert found is not None
    assert found.levels[0].standing == "open", "at LoRA's best learning rate alone"
    swept = runs({**adapters, (0, 1e-5): 0.4, (0, 1e-4): 0.7, (0, 1e-3): 0.1}, 3)
    found = contest(swept, "rank", 1, [LR], 0.3, maximize=True)
    assert found is not None
    assert found.levels[0].standing == "worse"


def test_one_seed_decides_nothing() -> None:
    found = contest(runs({(1, 1e-3): 0.3, (8, 1e-3): 0.9}, 1), "rank", 1, [LR], 0.2, maximize=True)
    assert found is not None
    assert not found.certain


def by_question(experiment: Experiment) -> dict[str, Decision]:
    return {one.question: one for one in decisions(experiment)}


def test_each_question_has_its_answer(experiment: Experiment) -> None:
    found = by_question(experiment)
    assert list(found) == [
        "Which rank?",
        "Which alpha?",
        "Which learning rate?",
        "Which target modules?",
        "Which batch size?",
    ]
    assert found["Which rank?"].value == "8"
    assert found["Which learning rate?"].value == "1e-3"
    assert (found["Which alpha?"].verdict, found["Which batch size?"].verdict) == ("not tested", "not tested")
    assert found["Which batch size?"].value == "128 sequences"
    assert all(one.evidence and one.next for one in found.values())


def checked(command: str) -> tuple[Recipe, space.Space]:
    """The recipe and the space that a `harness.sweep` command line sweeps."""
    python, flag, module, source, *overrides = shlex.split(command)
    assert (python, flag, module) == ("python", "-m", "harness.sweep")
    recipe = recipes.load(source, overrides)
    return recipe, space.from_recipe(recipe)


def test_commands_that_settle_are_sweeps_that_start(experiment: Experiment) -> None:
    lines = {one.question: one.command for one in decisions(experiment) if one.command}
    assert len(lines) >= 3
    for line in lines.values():
        recipe, swept = checked(line)
        assert recipe.sweep is not None
        assert len(swept.axes) == 1, "one question at a time, all else the winner's"
        assert recipe.sweep.num_trials == len(swept.axes[0].values() or ())
        if swept.axes[0].key != LR:
            assert recipe.trainer.policy.optimizer_config.lr == 1e-3
    assert [axis.key for axis in checked(str(lines["Which alpha?"]))[1].axes] == ["trainer.policy.model.lora.alpha"]


def test_a_rate_at_the_edge_is_the_next_to_run(tmp_path: Path) -> None:
    trials = [Trial(i, s, params(8, lr), 0.5 + i / 8) for i, lr in enumerate((1e-4, 3e-4, 1e-3)) for s in (0, 1)]
    found = Experiment.open(write_sweep(tmp_path, Sweep(trials, overrides=["trainer.run_name=this_one"])))
    rate = by_question(found)["Which learning rate?"]
    assert (rate.verdict, rate.at_edge) == ("cannot tell", True)
    then = next_step(found, decisions(found))
    assert then.command == rate.command
    recipe, swept = checked(str(then.command))
    assert recipe.trainer.run_name is None, "that directory is there already"
    values = swept.axes[0].values()
    assert values is not None
    assert values[0] == 1e-3
    assert values[-1] > 9e-3


def test_rivals_are_run_again_on_fresh_seeds(tmp_path: Path) -> None:
    scores = {1e-4: 0.5, 1e-3: 0.9, 2e-3: 0.89, 1e-2: 0.4}
    trials = [Trial(i, s, params(8, lr), score) for i, (lr, score) in enumerate(scores.items()) for s in (0, 1)]
    path = write_sweep(tmp_path, Sweep(trials))
    found = Experiment.open(path)
    then = next_step(found, decisions(found))
    assert then.why.startswith("The best 2 configurations are not told apart")
    assert shlex.split(str(then.command))[2:] == ["harness.sweep", "--resume", str(path), "--confirm", "2"]


@pytest.mark.parametrize(
    ("sweep", "why"),
    [
        (Sweep([Trial(0, 0, params(8, 1e-3), 0.9)], seeds=[0], status=Status.RUNNING), "Wait: the sweep has not ended"),
        (Sweep([Trial(0, 0, params(8, 1e-3), 0.9, Status.FAILED, "boom")], seeds=[0]), "1 of 1 run failed, most often"),
        (Sweep([Trial(0, 0, params(8, 1e-3), 0.9)]), "No configuration has all its seeds complete"),
        (Sweep([Trial(0, 0, params(8, 1e-3), 0.9, Status.PRUNED)], seeds=[0]), "Nothing has completed"),
    ],
    ids=["running", "failed", "a seed short", "pruned"],
)
def test_what_to_do_without_an_answer(tmp_path: Path, sweep: Sweep, why: str) -> None:
    found = Experiment.open(write_sweep(tmp_path, sweep))
    assert why in next_step(found, decisions(found)).why


def test_a_single_run_leads_to_a_sweep(tmp_path: Path) -> None:
    found = Experiment.open(write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9)))
    assert {one.verdict for one in decisions(found)} == {"not tested"}
    swept = checked(str(next_step(found, decisions(found)).command))[1]
    assert [axis.key for axis in swept.axes] == [LR]


def test_full_fine_tuning_has_no_alpha_to_ask_for(tmp_path: Path) -> None:
    overrides = ["trainer.policy.model.lora.sync=merge"]
    trials = [Trial(0, 0, params(0, 1e-4), 0.9), Trial(1, 0, params(8, 1e-4), 0.5)]
    found = Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0], overrides=overrides)))
    assert list(by_question(found)) == ["Which rank?", "Which learning rate?", "Which batch size?"]
    assert by_question(found)["Which rank?"].value == "full fine-tuning"


def test_the_winner_is_freed_of_its_own_choice(tmp_path: Path) -> None:
    """Six configurations with the same truth: the winner's mean flatters it, what is expected does not."""
    noise = np.random.default_rng(3).normal(0, 0.03, (6, 3))
    trials = [Trial(c, s, params(2**c, 1e-3), 0.8 + noise[c, s]) for c in range(6) for s in range(3)]
    found = Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0, 1, 2])))
    held = reading.expected(found)
    assert held is not None
    assert found.best is not None
    assert held.estimate.value < found.best.mean
    low, high = held.estimate.interval(0.025)
    assert low < 0.8 < high
    answer = reading.answer(found)
    assert "expected when run again" in [name for name, _, _ in answer.scores]
    assert "Run again, expect" in answer.text()


def test_a_value_whose_runs_all_failed_is_not_decided(tmp_path: Path) -> None:
    trials = [Trial(0, s, params(8, 1e-3), 0.9) for s in (0, 1)]
    trials += [Trial(1, s, params(1, 1e-3), 0.9, Status.FAILED, "boom") for s in (0, 1)]
    found = by_question(Experiment.open(write_sweep(tmp_path, Sweep(trials))))["Which rank?"]
    assert found.verdict == "cannot tell"
    assert "No other value" in found.evidence
    assert checked(str(found.command))[1].axes[0].values() == (1, 8)
