"""Learning curves: every evaluation of every run, against what the run had used by then."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from analysis.experiment import Experiment
from analysis.figures import learning_curves
from analysis.figures.drawing.render import render
from analysis.figures.drawing.theme import Look
from tests.unit.analysis import worlds
from tests.unit.analysis.figures.made import made, svg_of
from tests.unit.analysis.simulation import Arm, World
from tests.unit.analysis.synthetic import LR, Trial, params, write_run

SMALL = World((Arm(0, best=-4.0), Arm(8)), seeds=2, rates=3, failures=0.0)


def test_curves_hold_every_evaluation_of_every_trial(experiment: Experiment) -> None:
    curves: learning_curves.CurveData = learning_curves.data(experiment)[0].data
    assert (curves.shade, curves.best, curves.best_name) == (
        LR,
        "trials/0004",
        "trial 4, the best",
    )
    lines = dict(iter(curves.lines.groupby("run_dir")))
    assert len(lines) == 12
    assert lines["trials/0004"]["step"].tolist() == [0, 10, 20, 30, 40, 50]
    assert lines["trials/0011"]["step"].tolist() == [0, 10]
    assert set(lines["trials/0010"]["status"]) == {"FAILED"}
    # No tokens and no FLOPs were logged: there is nothing to draw against.
    assert curves.costs == ("step", "seconds")
    assert lines["trials/0004"]["seconds"].tolist() == pytest.approx(
        [1.5 + 3.3 * k for k in range(6)]
    )


def test_each_evaluation_knows_what_had_been_used() -> None:
    curves: learning_curves.CurveData = learning_curves.data(worlds.experiment(SMALL))[0].data
    assert curves.costs == ("step", "tokens", "flops", "seconds")
    runs = worlds.experiment(SMALL).tables.runs.set_index("run_dir")
    for run_dir, line in curves.lines.groupby("run_dir"):
        full = runs["rank"][run_dir] == 0
        assert line["tokens"].tolist() == [worlds.TOKENS * step for step in line["step"]]
        factor = worlds.FLOPS_PER_TOKEN * (1.5 if full else 1.0)
        assert line["flops"].tolist() == pytest.approx(
            [factor * tokens for tokens in line["tokens"]]
        )
        assert line["seconds"].tolist() == pytest.approx(
            [s + 0.5 * (s // worlds.EVERY + 1) for s in line["step"]]
        )


def test_half_of_the_gain_is_read_off_the_best_curve() -> None:
    experiment = worlds.experiment(SMALL)
    plot = learning_curves.data(experiment)[0]
    best = plot.data.lines[plot.data.lines["run_dir"] == plot.data.best]
    assert experiment.base is not None
    half = experiment.base + (best["score"].iloc[-1] - experiment.base) / 2
    step = int(best[best["score"] >= half]["step"].iloc[0])
    assert f"has half of its gain by step {step} ({step * 8}k tokens," in plot.reading
    assert "after 32 (256k tokens, " in plot.reading


def test_a_pointer_is_told_which_trial_a_curve_is_and_its_scores(experiment: Experiment) -> None:
    draw = partial(learning_curves.draw, learning_curves.data(experiment)[0].data)
    traces = render(draw, Look(), png=False).traces
    assert len(traces) == 2 * 12, "a trace per cost and run"
    trace = traces[4]
    assert trace.about == "trial 4: rank 8, learning rate 1e-3, target modules all-linear, seed 0"
    assert (trace.texts[0], trace.texts[-1]) == (
        "step 0: held-out accuracy 0.291",
        "step 50: held-out accuracy 0.920",
    )
    assert trace.places == sorted(trace.places), "steps go to the right"
    assert trace.places[0][1] > trace.places[-1][1], "and scores up"


@pytest.mark.parametrize("members", [1.0, 4.0])
def test_a_packs_seconds_are_called_its_own(members: float) -> None:
    logged = {"step_time": 2.0, "perf/members": members, "num_tokens": 100.0, "seconds": 2.0}
    steps = [
        {"number": 0, "step": s, "eval/accuracy": score, **logged}
        for s, score in ((1, 0.5), (2, 0.9))
    ]
    plot = learning_curves.data(made([{"score": 0.9}], steps))[0]
    assert plot.data.packed == ("of its pack's" in plot.reading) == (members > 1)
    svg = svg_of(partial(learning_curves.draw, plot.data), Look())
    assert ("seconds (of the whole pack)" in svg) == (members > 1)


def test_a_single_run_has_no_legend_to_need(tmp_path: Path) -> None:
    found = Experiment.open(write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9)))
    plot = learning_curves.data(found)[0]
    assert plot.data.best_name is None
    assert "the best" not in svg_of(partial(learning_curves.draw, plot.data), Look())


def test_a_peak_before_the_end_is_said(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    rows = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows.insert(-1, '{"step": 45, "eval/accuracy": 0.96875}\n')
    (path / "metrics.jsonl").write_text("".join(rows))
    assert (
        "; its best evaluation was 0.969 at step 45."
        in learning_curves.data(Experiment.open(path))[0].reading
    )
