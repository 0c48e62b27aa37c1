from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.experiment import Experiment
from analysis.report.answer import answer
from analysis.report.decisions import Decision, decisions
from analysis.report.next_step import next_step
from analysis.stats.scores import could_collapse, expected, seeds_to_bound
from analysis.stats.values import ValueComparison, compare_values
from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.records.run_dir import Status
from sweeps.study import space
from tests.unit.analysis.choices import Choice
from tests.unit.analysis.synthetic import (
    LR,
    RANK,
    TARGETS,
    Sweep,
    Trial,
    params,
    write_run,
    write_sweep,
)


def runs(means: dict[tuple[int, float], float], seeds: int, noise: float = 0.01) -> pd.DataFrame:
    """A sweep's runs from the true score per rank and learning rate; the same noise each time."""
    draw = np.random.default_rng(3)
    rows = [
        {
            "configuration": number,
            "seed": seed,
            "rank": rank,
            "full": rank == 0,
            LR: lr,
            RANK: rank,
            "confirm": False,
            "score": mean + draw.normal(0, noise),
        }
        for number, ((rank, lr), mean) in enumerate(means.items())
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows)


def compared(
    table: pd.DataFrame,
    column: str,
    winner: int | None = None,
    others: list[str] | None = None,
    *,
    floor: float = 0.3,
    maximize: bool = True,
) -> ValueComparison:
    """The comparison of a column's values; the winner is the best by its mean, on fresh seeds where
    there are such.
    """
    fresh = table[table["confirm"]] if table["confirm"].any() else table
    means = fresh.groupby("configuration")["score"].mean() * (1 if maximize else -1)
    chosen = int(str(means.idxmax())) if winner is None else winner
    found = compare_values(
        table, column, chosen, [LR] if others is None else others, floor, maximize=maximize
    )
    assert found is not None
    return found


def standings(found: ValueComparison) -> dict[Any, str]:
    return {level.value: level.standing for level in found.values}


@pytest.mark.parametrize(
    "world",
    [
        Choice("six values alike", (0.0,) * 6, seeds=2),
        Choice("one of four is noisier", (0.0,) * 4, noises=(3.0, 1.0, 1.0, 1.0)),
        Choice("eight alike, some confirmed", (0.0,) * 8, seeds=2, confirm=3),
        Choice("some collapse", (0.0,) * 4, collapse=(0.05,) * 4),
    ],
    ids=lambda world: world.name,
)
def test_equal_values_are_seldom_told_apart(world: Choice) -> None:
    """docs/claims.md has a thousand sweeps of each of many worlds."""
    shares = world.shares(100)
    assert max(shares["wrong best"], shares["wrong worse"]) <= 0.09, "two standard errors above 5%"
    assert shares["unstable best"] == 0


def test_a_clear_difference_is_found_and_a_small_one_is_a_tie() -> None:
    table = runs(
        {(1, 1e-3): 0.6, (8, 1e-3): 0.9, (64, 1e-3): 0.895, (8, 1e-4): 0.5}, 5, noise=0.003
    )
    found = compared(table, "rank", 1)
    assert (found.verdict, standings(found)) == ("tied", {1: "worse", 8: "chosen", 64: "tied"})
    assert found.margin == pytest.approx(0.06, abs=0.002)


def test_the_best_of_all_is_told_apart_from_each() -> None:
    found = compared(
        runs({(1, 1e-3): 0.6, (8, 1e-3): 0.9, (64, 1e-3): 0.7}, 4, noise=0.003), "rank"
    )
    assert (found.verdict, standings(found)) == ("best", {1: "worse", 8: "chosen", 64: "worse"})
    low, high = found.values[0].interval or (0.0, 0.0)
    assert 0.28 < low < 0.3 < high < 0.32, "positive where the chosen one is ahead"


def test_lower_is_better_turns_it_round() -> None:
    found = compared(runs({(1, 1e-3): 2.0, (8, 1e-3): 1.0}, 4), "rank", floor=3.0, maximize=False)
    assert standings(found) == {1: "worse", 8: "chosen"}
    ahead = found.values[0].ahead
    assert ahead is not None
    assert ahead.value == pytest.approx(1.0, abs=0.05), "positive where the chosen one is better"


def confirmed(
    rank_8: tuple[list[float], list[float]], rank_1: tuple[list[float], list[float]]
) -> pd.DataFrame:
    """Two ranks, the scores of each on the sweep's seeds and on fresh ones."""
    rows = [
        {
            "configuration": number,
            "seed": seed + 100 * fresh,
            "rank": rank,
            "full": False,
            LR: 1e-3,
            "confirm": bool(fresh),
            "score": score,
        }
        for number, (rank, both) in enumerate(((8, rank_8), (1, rank_1)))
        for fresh, scores in enumerate(both)
        for seed, score in enumerate(scores)
    ]
    return pd.DataFrame(rows)


def test_fresh_seeds_decide_against_the_sweeps_leader() -> None:
    table = confirmed(([0.93, 0.95], [0.70, 0.72, 0.71]), ([0.90, 0.90], [0.90, 0.92, 0.91]))
    found = compared(table, "rank", 0, [])
    assert standings(found) == {1: "better", 8: "chosen"}, (
        "whoever is called the winner, the other is ahead of it"
    )
    assert found.verdict == "open"
    found = compared(table, "rank", None, [])
    assert (found.chosen.value, found.verdict) == (1, "best")
    held = expected(table, 0.3, maximize=True)
    assert held is not None
    assert held.estimate.value == pytest.approx(0.91)
    assert held.how == "3 fresh seeds"


def test_fresh_seeds_count_where_the_sweep_had_one() -> None:
    held = expected(confirmed(([0.83], [0.754, 0.799]), ([0.7], [])), 0.3, maximize=True)
    assert held is not None
    assert held.estimate.value == pytest.approx(0.7765)
    assert held.how == "2 fresh seeds"


def test_a_value_with_a_collapsed_seed_is_never_best() -> None:
    table = runs({(1, 1e-3): 0.5, (8, 1e-3): 0.9, (64, 1e-3): 0.5}, 3, noise=0.002)
    table.loc[(table["rank"] == 8) & (table["seed"] == 2), "score"] = 0.31
    found = compared(table, "rank", 1)
    assert (found.chosen.collapsed, found.verdict) == (1, "open")
    found = compared(table, "rank", 2)
    assert standings(found) == {1: "tied", 8: "unstable", 64: "chosen"}
    assert found.verdict == "open"
    ranking = compared(table, "configuration", 1, [])
    assert (ranking.chosen.collapsed, ranking.chosen.tried) == (1, 3)


def test_a_run_that_failed_by_diverging_is_a_collapsed_seed() -> None:
    table = runs({(1, 1e-3): 0.85, (8, 1e-3): 0.9}, 3, noise=0.005).assign(diverged=False)
    last = (table["rank"] == 8) & (table["seed"] == 2)
    table.loc[last, "score"], table.loc[last, "diverged"] = np.nan, True
    assert standings(compared(table, "rank", 0)) == {1: "chosen", 8: "unstable"}


def test_seeds_that_did_not_collapse_bound_the_share_that_could() -> None:
    assert [round(100 * could_collapse(seeds)) for seeds in (2, 3, 10)] == [78, 63, 26]
    assert seeds_to_bound(0.2) == 14
    assert could_collapse(14) < 0.2 < could_collapse(13)


def test_a_value_that_was_never_tried_as_the_winner_was_is_not_judged() -> None:
    found = compared(runs({(8, 1e-3): 0.9, (8, 1e-4): 0.5, (1, 1e-5): 0.3}, 3), "rank", 0)
    assert [(level.value, level.fair, level.standing) for level in found.values] == [
        (1, False, "open"),
        (8, True, "chosen"),
    ]


def test_a_rank_that_came_with_other_target_modules_is_not_judged() -> None:
    """Attention at rank 12 has as many parameters as MLP at rank 8: modules are compared so, ranks
    are not.
    """
    draw = np.random.default_rng(7)
    rates = {1e-4: 0.4, 1e-3: 0.0, 1e-2: 0.4}  # less than the arm's best
    arms = [("mlp", 8, 100, 0.9), ("attention", 12, 101, 0.6), ("all-linear", 8, 150, 0.89)]
    table = pd.DataFrame(
        {
            "configuration": 3 * arm + place,
            "seed": seed,
            "rank": rank,
            "full": False,
            LR: lr,
            RANK: rank,
            "targets": modules,
            TARGETS: modules,
            "parameters": size,
            "confirm": False,
            "score": score - less + draw.normal(0, 0.003),
        }
        for arm, (modules, rank, size, score) in enumerate(arms)
        for place, (lr, less) in enumerate(rates.items())
        for seed in range(3)
    )
    assert standings(compared(table, "rank", 1, [LR, TARGETS])) == {8: "chosen", 12: "open"}
    modules = compared(table, "targets", 1, [LR, RANK])
    assert standings(modules) == {"mlp": "chosen", "attention": "worse", "all-linear": "tied"}


def test_full_fine_tuning_is_judged_at_learning_rates_of_its_own() -> None:
    adapters = {(8, lr): 0.9 if lr == 1e-3 else 0.5 for lr in (1e-4, 1e-3, 1e-2)}
    once = compared(runs({**adapters, (0, 1e-3): 0.1}, 3), "rank", 1)
    assert once.values[0].standing == "open", "at LoRA's best learning rate alone"
    swept = compared(
        runs({**adapters, (0, 1e-5): 0.4, (0, 1e-4): 0.7, (0, 1e-3): 0.1}, 3), "rank", 1
    )
    assert swept.values[0].standing == "worse"


def test_one_seed_decides_nothing() -> None:
    assert (
        compared(runs({(1, 1e-3): 0.3, (8, 1e-3): 0.9}, 1), "rank", 1, floor=0.2).verdict == "open"
    )


def test_seeds_that_would_settle_it_are_more_where_the_difference_is_less() -> None:
    table = runs({(1, 1e-3): 0.80, (8, 1e-3): 0.9, (64, 1e-3): 0.84}, 2, noise=0.0)
    table["score"] += np.where(table["seed"] == 0, 0.02, -0.02)
    found = compared(table, "rank", 1)
    near, far = (found.seeds_needed(found.values[place], 40) for place in (2, 0))
    assert near is not None
    assert far is not None
    assert 2 < far < near


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
    assert found["Which learning rate?"].value == "3e-4 to 1e-3 (highest score at 1e-3)"
    assert (found["Which alpha?"].verdict, found["Which batch size?"].verdict) == (
        "not tested",
        "not tested",
    )
    assert found["Which batch size?"].value == "128 sequences"
    assert all(one.evidence and one.next for one in found.values())


def checked(command: str) -> tuple[Recipe, space.Space]:
    """The recipe and the space that a `harness.sweep` command line sweeps."""
    python, flag, module, source, *overrides = shlex.split(command)
    assert (python, flag, module) == ("python", "-m", "harness.sweep")
    recipe = recipes.load(source, overrides)
    return recipe, space.from_recipe(recipe)


def test_a_rate_at_the_edge_is_the_next_to_run(tmp_path: Path) -> None:
    trials = [
        Trial(i, s, params(8, lr), 0.5 + i / 8)
        for i, lr in enumerate((1e-4, 3e-4, 1e-3))
        for s in (0, 1)
    ]
    found = Experiment.open(
        write_sweep(tmp_path, Sweep(trials, overrides=["trainer.run_name=this_one"]))
    )
    rate = by_question(found)["Which learning rate?"]
    assert (rate.verdict, rate.at_edge) == ("open", True)
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
    trials = [
        Trial(i, s, params(8, lr), score + s / 64)
        for i, (lr, score) in enumerate(scores.items())
        for s in (0, 1)
    ]
    path = write_sweep(tmp_path, Sweep(trials))
    found = Experiment.open(path)
    then = next_step(found, decisions(found))
    assert then.why.startswith("2 configurations are not told apart. Run the best 2 again")
    assert shlex.split(str(then.command))[2:] == [
        "harness.sweep",
        "--resume",
        str(path),
        "--confirm",
        "2",
    ]


@pytest.mark.parametrize(
    ("sweep", "why"),
    [
        (
            Sweep([Trial(0, 0, params(8, 1e-3), 0.9)], seeds=[0], status=Status.RUNNING),
            "Wait: the sweep has not ended",
        ),
        (
            Sweep([Trial(0, 0, params(8, 1e-3), 0.9, Status.FAILED, "boom")], seeds=[0]),
            "1 of 1 run failed, most often",
        ),
        (Sweep([Trial(0, 0, params(8, 1e-3), 0.9)]), "No configuration has all its seeds complete"),
        (
            Sweep([Trial(0, 0, params(8, 1e-3), 0.9, Status.PRUNED)], seeds=[0]),
            "Nothing has completed",
        ),
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
    """Six configurations with the same truth: the winner's mean flatters it, what is expected does
    not.
    """
    noise = np.random.default_rng(3).normal(0, 0.03, (6, 3))
    trials = [
        Trial(c, s, params(2**c, 1e-3), 0.8 + noise[c, s]) for c in range(6) for s in range(3)
    ]
    found = Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0, 1, 2])))
    held = found.expected
    assert held is not None
    assert found.best is not None
    assert held.estimate.value < found.best.score
    low, high = held.estimate.interval(0.025)
    assert low < 0.8 < high
    headline = answer(found)
    assert "expected when run again" in [name for name, _, _ in headline.scores]
    assert "Run again, expect" in headline.text()


def test_a_value_whose_runs_all_failed_is_not_decided(tmp_path: Path) -> None:
    trials = [Trial(0, s, params(8, 1e-3), 0.9) for s in (0, 1)]
    trials += [Trial(1, s, params(1, 1e-3), 0.9, Status.FAILED, "boom") for s in (0, 1)]
    found = by_question(Experiment.open(write_sweep(tmp_path, Sweep(trials))))["Which rank?"]
    assert found.verdict == "open"
    assert "No other value" in found.evidence
    assert checked(str(found.command))[1].axes[0].values() == (1, 8)
