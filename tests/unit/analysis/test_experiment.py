from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.experiment import Experiment
from analysis.report import compare, tables
from analysis.report.answer import answer, rate_rows, standing
from analysis.report.decisions import decisions
from harness.records.run_dir import RunDir, Status
from tests.unit.analysis.data.test_tables import on_inputs
from tests.unit.analysis.synthetic import (
    ALPHA,
    BASE,
    LR,
    PROBLEMS,
    RANK,
    TARGETS,
    Sweep,
    Trial,
    params,
    rewrite_manifest,
    write_run,
    write_sweep,
)


def test_what_the_example_sweep_is(experiment: Experiment) -> None:
    assert experiment.is_sweep
    assert experiment.finished
    assert (experiment.metric, experiment.direction) == ("eval/accuracy", "maximize")
    assert experiment.seeds == [0, 1]
    assert experiment.axes == [RANK, LR, TARGETS]
    assert experiment.base == pytest.approx(BASE)
    assert experiment.problems == PROBLEMS


def test_a_newer_manifest_counts_as_if_the_directory_was_read_again(tmp_path: Path) -> None:
    trials = [Trial(0, 0, params(8, 1e-3), 0.9)]
    directory = write_sweep(tmp_path, Sweep(trials, status=Status.RUNNING))
    before = Experiment.open(directory)
    run_dir = RunDir(directory)
    run_dir.update(seconds=7.0)
    run_dir.move_to(Status.COMPLETE, result={"best": {"trial": 0}})
    after = before.with_manifest(run_dir.read_manifest())
    assert (before.finished, after.finished) == (False, True)
    assert after.manifest["result"] == {"best": {"trial": 0}}
    pd.testing.assert_frame_equal(after.tables.sources, Experiment.open(directory).tables.sources)


def test_the_best_trial_is_the_better_seed_of_the_best_configuration(
    experiment: Experiment,
) -> None:
    best = experiment.best_trial()
    assert best is not None
    assert (best["configuration"], best["number"]) == (2, 4)


def test_basin_at_a_rank_and_over_all(experiment: Experiment) -> None:
    at_8, over_all = experiment.rate_split(8), experiment.rate_split()
    assert at_8 is not None
    assert over_all is not None
    assert (at_8.too_low, at_8.good, at_8.too_high) == ((1e-5,), (3e-4, 1e-3), (1e-2,))
    assert over_all.best == 1e-3
    assert 3e-3 not in over_all.tested, "one of two seeds is still running: no evidence yet"


def test_problems_are_not_counted_in_a_file_that_has_changed(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    changed = tmp_path / "changed.parquet"
    pd.DataFrame({"question": ["one", "two"]}).to_parquet(changed)
    assert Experiment.open(path).problems == PROBLEMS
    data = dict.fromkeys(Experiment.open(path).manifest["data"], "sha256:0")
    rewrite_manifest(path, data=data)
    assert Experiment.open(path).problems is None


def test_a_graded_score_has_no_binomial_interval(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    rewrite_manifest(
        path, result={"step": 50, "metrics": {"eval/accuracy": 0.12345}, "base": {}, "seconds": 1.0}
    )
    found = Experiment.open(path)
    assert found.problems is None
    assert "interval" not in answer(found).title


def test_answer_names_settings_swept_or_not_scores_and_doubt(experiment: Experiment) -> None:
    found = answer(experiment)
    assert found.title == (
        "Of 4 configurations, rank 8, alpha 32, learning rate 1e-3, target modules all-linear won: "
        "held-out accuracy 0.910, against the base's 0.291."
    )
    assert ("alpha", "32", False) in found.settings
    assert ("learning rate", "1e-3", True) in found.settings
    text = " ".join(found.sentences)
    assert (
        "Its 2 seeds gave 0.900 to 0.920. None of its 2 seeds collapsed: with 95% "
        "confidence at most 78% would; 14" in text
    )
    assert (
        "The runner-up (rank 8, learning rate 3e-4, target modules all-linear) is 0.061 behind"
        in text
    )
    assert "1 of 3 other configurations is not told apart from the winner." in text
    assert "2 more configurations did not complete on every seed and cannot win" in text


def test_a_near_tie_is_said_to_be_one(tmp_path: Path) -> None:
    scores = [0.90, 0.89, 0.88]
    trials = [Trial(i, 0, params(2**i, 1e-3), score) for i, score in enumerate(scores)]
    text = answer(Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0])))).text()
    assert (
        "The runner-up (rank 2) is 0.010 behind. One seed does not tell configurations apart"
        in text
    )
    assert (
        "It has one seed: how far seeds differ is not known, and up to 95% of them could collapse."
        in text
    )


def confirmed(
    tmp_path: Path, scores: dict[int, tuple[list[float], list[float]]], seeds: list[int]
) -> Experiment:
    """A sweep over ranks, some run again on fresh seeds: the scores of the sweep's seeds and of
    fresh ones, by rank.
    """
    trials = [
        Trial(place, 100 * fresh + seed, params(rank, 1e-3), score, confirm=bool(fresh))
        for fresh in (0, 1)
        for place, (rank, both) in enumerate(scores.items())
        for seed, score in enumerate(both[fresh])
    ]
    return Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=seeds)))


def test_fresh_seeds_that_overturn_the_sweep_are_the_answer(tmp_path: Path) -> None:
    found = confirmed(
        tmp_path, {8: ([0.93, 0.95], [0.70, 0.72]), 1: ([0.90, 0.90], [0.90, 0.92])}, [0, 1]
    )
    headline = answer(found)
    assert headline.title.startswith("Of 2 configurations, rank 1, alpha 32, learning rate 1e-3")
    assert "scored best on 2 fresh seeds: held-out accuracy 0.910" in headline.title
    assert (
        "The fresh seeds overturn the sweep: rank 8 led it with 0.939 and scored 0.710"
        in headline.sentences[0]
    )
    rank = next(one for one in decisions(found) if one.question == "Which rank?")
    assert (rank.value, rank.verdict) == ("1", "best")
    assert "rank 8 is 0.200 behind" in rank.evidence.lower()
    assert found.configurations["configuration"].tolist() == [1, 0]
    assert found.configurations["fresh"].tolist() == pytest.approx([0.91, 0.71], abs=2e-3)


def test_fresh_seeds_tell_what_one_seed_could_not(tmp_path: Path) -> None:
    found = confirmed(tmp_path, {8: ([0.83], [0.754, 0.799]), 1: ([0.70], [])}, [0])
    assert found.expected is not None
    assert found.expected.estimate.value == pytest.approx(0.7765, abs=2e-3)
    text = answer(found).text()
    assert "scored best on 2 fresh seeds: held-out accuracy 0.776" in text
    assert "0.830" not in text
    assert "one seed" not in text.lower()


def test_a_winner_of_which_a_seed_collapsed_is_called_unstable(tmp_path: Path) -> None:
    scores = {0: [0.9, 0.92, 0.31], 1: [0.6, 0.61, 0.62], 2: [0.5, 0.51, 0.52]}
    trials = [
        Trial(c, s, params(2**c, 1e-3), score)
        for c, row in scores.items()
        for s, score in enumerate(row)
    ]
    found = Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0, 1, 2])))
    assert found.best is not None
    assert found.best.configuration == 0
    assert "It is unstable: 1 of its 3 seeds collapsed" in answer(found).text()
    assert "best" not in {one.verdict for one in decisions(found)}


def test_equal_means_are_called_a_tie(tmp_path: Path) -> None:
    trials = [Trial(0, 0, params(8, 1e-3), 0.9), Trial(1, 0, params(4, 1e-3), 0.9)]
    text = answer(Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0])))).text()
    assert (
        "target modules all-linear shares first place with 1 other: held-out accuracy 0.900" in text
    )
    assert "The runner-up (rank 4) ties with it" in text


def test_a_winner_at_the_edge_of_what_was_tested_is_said(tmp_path: Path) -> None:
    trials = [Trial(0, 0, params(8, 1e-4), 0.5), Trial(1, 0, params(8, 1e-3), 0.9)]
    text = answer(Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0])))).text()
    assert "Its learning rate is the highest tested at this rank: a better one" in text


def test_a_rate_at_which_runs_diverged_was_tested(tmp_path: Path) -> None:
    diverged = Trial(
        2, 0, params(8, 1e-2), 0.6, Status.FAILED, "3 non-finite gradient norms in a row at step 20"
    )
    trials = [Trial(0, 0, params(8, 1e-4), 0.5), Trial(1, 0, params(8, 1e-3), 0.9), diverged]
    found = Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0])))
    basin = found.rate_split(8)
    assert basin is not None
    assert basin.too_high == (1e-2,)
    assert "tested at this rank" not in answer(found).text()


def test_training_that_did_not_help_is_said(tmp_path: Path) -> None:
    found = answer(Experiment.open(write_run(tmp_path, Trial(0, 0, params(8, 1e-1), 0.05))))
    assert "no better than the base" in found.text()


def test_a_gain_within_chance_is_said(tmp_path: Path) -> None:
    found = answer(Experiment.open(write_run(tmp_path, Trial(0, 0, params(8, 1e-5), BASE + 0.01))))
    assert "may be chance" in found.text()


def test_lower_is_better_picks_the_other_end(tmp_path: Path) -> None:
    trials = [
        Trial(0, 0, params(8, 1e-3), 0.05),
        Trial(1, 0, params(8, 3e-3), 0.2),
        Trial(2, 0, params(4, 1e-3), 0.25),
    ]
    path = write_sweep(tmp_path, Sweep(trials, seeds=[0], metric="completions/clipped_ratio"))
    found = Experiment.open(path)
    best = found.best_trial()
    assert best is not None
    assert best["number"] == 0
    assert found.configurations["configuration"].tolist() == [0, 1, 2]
    basin = found.rate_split(8)
    assert basin is not None
    assert (basin.good, basin.too_high) == ((1e-3,), (3e-3,))


def test_no_complete_configuration_has_no_winner_but_a_leader(tmp_path: Path) -> None:
    half = [
        Trial(0, 0, params(8, 1e-3), 0.9),
        Trial(0, 1, params(8, 1e-3), 0.9, Status.RUNNING, last_step=30),
    ]
    path = write_sweep(tmp_path, Sweep(half, status=Status.RUNNING))
    found = Experiment.open(path)
    assert found.best is None
    assert found.best_trial() is None
    headline = answer(found)
    assert headline.title == "No winner yet: no configuration has all its 2 seeds complete."
    assert "0.900 on 1 of 2 seeds" in headline.text()


def test_full_fine_tuning_has_neither_alpha_nor_targets(tmp_path: Path) -> None:
    overrides = ["trainer.policy.model.lora.sync=merge"]
    trials = [Trial(0, 0, params(0, 1e-4), 0.9), Trial(1, 0, params(8, 1e-4), 0.5)]
    path = write_sweep(tmp_path, Sweep(trials, seeds=[0], overrides=overrides))
    title = answer(Experiment.open(path)).title
    assert "full fine-tuning, learning rate 1e-4 won" in title
    assert "alpha" not in title


def test_learning_rates_by_rank_in_words(experiment: Experiment) -> None:
    rows = {row["rank"]: row for row in rate_rows(experiment)}
    assert rows["rank 8"] == {
        "rank": "rank 8",
        "too_low": "1e-5",
        "good": "3e-4 to 1e-3",
        "best": "1e-3",
        "too_high": "1e-2",
    }
    basin = experiment.rate_split(8)
    assert basin is not None
    assert basin.in_words() == "1e-5 too low, 3e-4 to 1e-3 good (best 1e-3), 1e-2 too high."


def test_standing_counts_every_status(experiment: Experiment) -> None:
    assert standing(experiment) == "12 trials: 9 complete, 1 running, 1 pruned and 1 failed."


def test_an_axis_that_never_moved_is_no_axis(experiment: Experiment) -> None:
    assert ALPHA in experiment.trials.columns
    assert ALPHA not in experiment.axes


def test_inputs_that_changed_are_marked_in_every_table_and_not_mixed(
    sweep_dir: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(sweep_dir, tmp_path / "changed"))
    on_inputs(changed, [2], [2], [2], [2], [1], [1], [1], [1], [1], [2], [1], [1])
    found = Experiment.open(changed)
    assert found.best is not None
    assert found.best.configuration == 1  # configuration 2 scored higher, on other data
    assert found.best.candidates == 2
    said = standing(found)
    assert said.startswith("12 trials: 4 complete, 1 running and 7 on other inputs")
    assert said.endswith(
        "Its inputs changed while it ran (data x: one -> two). Only trials on inputs 2 are "
        "compared; 7 trials on other inputs are marked."
    )
    for table, title in (
        (tables.trials([found]), "trial"),
        (tables.configurations(found), "config"),
    ):
        titles = [column.title for column in table.columns]
        marks = {
            row.cells[titles.index(title)]: row.cells[titles.index("inputs")] for row in table.rows
        }
        assert marks["0"] == "2"
        assert marks["5"] == "1"
    assert marks["4"] == "1, 2"
    titles = [
        column.title for column in compare.best_of_each([found, Experiment.open(sweep_dir)]).columns
    ]
    assert "inputs" in titles


def test_where_the_inputs_did_not_change_nothing_is_said_of_them(experiment: Experiment) -> None:
    assert "inputs" not in standing(experiment)
    for table in (
        tables.trials([experiment]),
        tables.configurations(experiment),
        compare.best_of_each([experiment]),
    ):
        assert "inputs" not in [column.title for column in table.columns]


def test_a_run_that_went_on_with_other_inputs_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    on_inputs(path)
    found = Experiment.open(path)
    assert standing(found) == (
        "A single run: complete. Its inputs changed after step 20 (data x: one -> two): "
        "its curve mixes two experiments."
    )
    table = tables.trials([found])
    assert (
        table.rows[0].cells[[column.title for column in table.columns].index("inputs")]
        == "1 then 2"
    )
