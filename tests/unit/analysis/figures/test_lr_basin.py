"""Score against learning rate: lines, intervals, diverged runs and the grid's edge, on sweeps with
a known truth.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from analysis.experiment import Experiment
from analysis.figures import lr_basin
from analysis.figures.drawing.marks import each
from analysis.figures.drawing.render import render
from analysis.figures.drawing.theme import Look
from tests.unit.analysis import worlds
from tests.unit.analysis.figures.made import made, svg_of
from tests.unit.analysis.simulation import by_rank
from tests.unit.analysis.synthetic import Sweep, Trial, params, write_sweep


def rates(experiment: Experiment) -> lr_basin.BasinData:
    """The one plot's data."""
    found = lr_basin.data(experiment)[0].data
    assert isinstance(found, lr_basin.BasinData)
    return found


def test_shows_the_last_score_of_what_did_not_complete(experiment: Experiment) -> None:
    plot = lr_basin.data(experiment)[0]
    points = plot.data.points
    assert len(points) == 12
    assert points["status"].value_counts().to_dict() == {
        "COMPLETE": 9,
        "RUNNING": 1,
        "FAILED": 1,
        "PRUNED": 1,
    }
    assert points[points["status"] == "FAILED"]["score"].tolist() == pytest.approx([0.99], abs=1e-3)
    assert plot.reading.startswith(
        "1e-5 too low, 3e-4 to 1e-3 good (best 1e-3), 1e-2 too high. Best rate tested"
    )
    assert "rank 8 1e-3 (0.910, 0.900 to 0.920)" in plot.reading
    svg = svg_of(partial(lr_basin.draw, plot.data), Look())
    for text in (
        "too low",
        "too high",
        "rank 1",
        "rank 8",
        "diverged",
        "running: last score",
        "range of 2 seeds",
    ):
        assert text in svg


def test_a_line_goes_through_each_ranks_best_configuration() -> None:
    trials = [
        {"rank": 8, "lr": 1e-4, "alpha": 16.0, "score": 0.4},
        {"rank": 8, "lr": 1e-4, "alpha": 32.0, "score": 0.5},
        {"rank": 8, "lr": 1e-3, "alpha": 16.0, "score": 0.9},
        {"rank": 8, "lr": 1e-3, "alpha": 32.0, "score": 0.7},
        {"rank": 1, "lr": 1e-3, "score": 0.6, "seed": 0},
        {"rank": 1, "lr": 1e-3, "score": 0.7, "seed": 1},
    ]
    found = rates(
        made([{**trial, "seed": seed} for trial in trials[:4] for seed in (0, 1)] + trials[4:])
    )
    lines = found.lines[["rank", "lr", "mean", "n"]].values.tolist()
    assert lines == [
        [1, 1e-3, pytest.approx(0.65), 2],
        [8, 1e-4, pytest.approx(0.5), 2],
        [8, 1e-3, pytest.approx(0.9), 2],
    ]
    assert found.tops[["rank", "lr"]].values.tolist() == [[1, 1e-3], [8, 1e-3]]


def test_of_a_loss_the_lowest_is_the_best() -> None:
    trials = [
        {"lr": lr, "score": score, "base": 2.0}
        for lr, score in ((1e-4, 1.5), (1e-3, 0.5), (1e-2, 1.0))
    ]
    found = rates(made(trials, metric="loss", maximize=False))
    assert found.tops["lr"].tolist() == [1e-3]


@pytest.mark.parametrize(
    ("beyond", "edge"),
    [(None, "highest"), ("FAILED", None), ("PRUNED", None), ("RUNNING", "highest")],
)
def test_a_best_rate_that_is_the_last_tested_is_warned_of(
    beyond: str | None, edge: str | None
) -> None:
    trials: list[dict[str, object]] = [
        {"lr": lr, "score": score} for lr, score in ((1e-4, 0.4), (1e-3, 0.9))
    ]
    if beyond:
        trials.append({"lr": 1e-2, "status": beyond, "diverged": beyond == "FAILED", "last": 0.1})
    experiment = made(trials)
    assert rates(experiment).tops["edge"].tolist() == [edge]
    warning = (
        "Warning: the best of rank 8 is the highest rate tested, so a better one may lie beyond."
    )
    assert (warning in lr_basin.data(experiment)[0].reading) == (edge is not None)


def test_a_run_that_diverged_before_its_first_evaluation_is_shown() -> None:
    trials: list[dict[str, object]] = [{"lr": lr, "score": 0.5} for lr in (1e-4, 1e-3)]
    lost = {"lr": 1e-1, "status": "FAILED", "diverged": True}
    plot = lr_basin.data(made([*trials, lost, {**lost, "rank": 0}]))[0]
    assert plot.data.points["score"].isna().sum() == 2
    assert "2 of 4 runs diverged: full fine-tuning at 1e-1 and LoRA at 1e-1." in plot.reading
    assert "diverged" in svg_of(partial(lr_basin.draw, plot.data), Look())


def test_a_pointer_is_told_of_every_run_and_of_the_means(experiment: Experiment) -> None:
    draw = partial(lr_basin.draw, lr_basin.data(experiment)[0].data)
    told = {trace.about: trace.texts for trace in render(draw, Look(), png=False).traces}
    settings = "rank 8, learning rate 1e-2, target modules all-linear"
    assert told[f"trial 10: {settings}, seed 0"] == [
        "diverged: failed, last held-out accuracy 0.990"
    ]
    assert told["trial 4: rank 8, learning rate 1e-3, target modules all-linear, seed 0"] == [
        "held-out accuracy 0.920"
    ]
    assert told["rank 8"][-1] == "learning rate 1e-3: mean 0.910 of 2 seeds, 0.900 to 0.920"
    assert len(told) == 12 + 2


def test_a_long_label_is_broken_in_the_legend_of_a_narrow_page(experiment: Experiment) -> None:
    draw, source = (
        partial(lr_basin.draw, lr_basin.data(experiment)[0].data),
        "range of 2 seeds or 95% interval over",
    )
    wide, narrow = (svg_of(draw, Look(narrow=narrow)) for narrow in (False, True))
    assert (source in wide, source in narrow) == (True, False)
    assert ">interval over 512 problems<" in narrow


def test_a_run_without_a_score_tells_so_at_the_foot() -> None:
    trials: list[dict[str, object]] = [{"lr": lr, "score": 0.5} for lr in (1e-4, 1e-3)]
    lost = {"lr": 1e-1, "status": "FAILED", "diverged": True}
    traces = render(partial(lr_basin.draw, rates(made([*trials, lost]))), Look(), png=False).traces
    foot = next(trace for trace in traces if trace.about.startswith("trial 2"))
    assert foot.texts == ["diverged: failed, no score"]
    assert foot.places[0][1] > max(y for trace in traces[:2] for _, y in trace.places)


def test_a_simulated_sweeps_lines_peak_at_its_best_rates() -> None:
    found = rates(worlds.experiment(by_rank(failures=0.0)))
    truth = {0: 1e-3 / 9.8, 1: 1e-3, 4: 1e-3, 16: 1e-3, 64: 1e-3}
    assert found.tops["rank"].tolist() == list(truth)
    for top in each(found.tops):
        assert top.lr == pytest.approx(truth[top.rank], rel=1.1)
        assert top.low < top.mean < top.high
        assert top.n == 3


def test_full_fine_tuning_is_kept_out_of_loras_band(tmp_path: Path) -> None:
    overrides = ["trainer.policy.model.lora.sync=merge"]
    tried = [(0, 1e-5, 0.9), (0, 1e-4, 0.3), (8, 1e-4, 0.4), (8, 1e-3, 0.9), (8, 1e-2, 0.4)]
    trials = [Trial(i, 0, params(rank, lr), score) for i, (rank, lr, score) in enumerate(tried)]
    found = Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0], overrides=overrides)))
    reading = lr_basin.data(found)[0].reading
    assert reading.startswith("LoRA, all ranks together: 1e-4 too low, 1e-3 good, 1e-2 too high.")


def test_no_figure_when_the_rate_was_not_swept() -> None:
    assert lr_basin.data(made([{"rank": rank, "score": 0.5} for rank in (1, 8)])) == []
