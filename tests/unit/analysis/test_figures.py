"""The contract of every registered figure, and what each one's data says of the example sweep."""

from __future__ import annotations

import pkgutil
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest
from matplotlib.image import imread

from analysis import figures
from analysis.experiment import Experiment
from analysis.figures import Figure, all_figures, learning_curves, lr_basin, score_by_axis
from analysis.figures.theme import Look, render
from harness.rundir import Status
from tests.unit.analysis.synthetic import LR, RANK, TARGETS, Sweep, Trial, params, write_run, write_sweep

MODULES = [found.name for found in pkgutil.iter_modules(figures.__path__) if found.name != "theme"]
LOOKS = [Look(dark, narrow) for dark in (False, True) for narrow in (False, True)]


def test_every_module_registers_its_figure() -> None:
    assert len(all_figures()) == len(MODULES) == 3
    orders = [figure.order for figure in all_figures()]
    assert orders == sorted(set(orders))


@pytest.mark.parametrize("figure", all_figures(), ids=lambda figure: figure.data.__module__.rsplit(".", 1)[-1])
class TestContract:
    def test_says_in_words_what_it_shows(self, figure: Figure, experiment: Experiment) -> None:
        plots = figure.data(experiment)
        assert plots
        for plot in plots:
            assert plot.name.isidentifier()
            assert plot.reading.endswith(".")
            assert plot.reading in plot.alt

    @pytest.mark.parametrize("look", LOOKS, ids=str)
    def test_draws_for_every_page(self, figure: Figure, experiment: Experiment, look: Look) -> None:
        for plot in figure.data(experiment):
            svg = render(partial(figure.draw, plot.data), look, "svg")
            root = ET.fromstring(svg)
            assert root.tag.endswith("svg")
            assert look.colours["paper"] in svg.decode()
            width = float(root.attrib["width"].removesuffix("pt"))
            assert width == pytest.approx(look.size[0] * 72, rel=0.01)

    def test_equal_data_gives_equal_bytes(self, figure: Figure, experiment: Experiment) -> None:
        plot = figure.data(experiment)[0]
        for kind in ("svg", "png"):
            assert render(partial(figure.draw, plot.data), Look(), kind) == render(
                partial(figure.draw, plot.data), Look(), kind
            )

    def test_nothing_to_show_is_no_plot(self, figure: Figure, tmp_path: Path) -> None:
        empty = Experiment.open(write_sweep(tmp_path, Sweep([], status=Status.RUNNING)))
        assert figure.data(empty) == []

    def test_stands_a_sweep_in_which_nothing_completed(self, figure: Figure, tmp_path: Path) -> None:
        trials = [
            Trial(0, 0, params(8, 1e-3), 0.4, Status.FAILED, "out of memory", last_step=10),
            Trial(1, 0, params(1, 1e-2), 0.2, Status.PRUNED, "below the median", last_step=10),
            Trial(2, 0, params(1, 1e-4), 0.2, Status.CREATED),
        ]
        found = Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0], status=Status.RUNNING)))
        for plot in figure.data(found):
            assert render(partial(figure.draw, plot.data), Look(), "svg")


def test_a_png_is_an_image_of_the_look(experiment: Experiment, tmp_path: Path) -> None:
    plot = learning_curves.data(experiment)[0]
    file = tmp_path / "curves.png"
    file.write_bytes(render(partial(learning_curves.draw, plot.data), Look(dark=True), "png"))
    pixels = imread(file)
    assert pixels.shape == (660, 1440, 4)
    assert (pixels[2, 2, :3] * 255).round().tolist() == [0x1C, 0x21, 0x26]


def test_curves_hold_every_evaluation_of_every_trial(experiment: Experiment) -> None:
    curves: learning_curves.Curves = learning_curves.data(experiment)[0].data
    assert (curves.shade, curves.log, curves.best, curves.best_name) == (LR, True, "trials/0004", "trial 4, the best")
    lines = dict(iter(curves.lines.groupby("run_dir")))
    assert len(lines) == 12
    assert lines["trials/0004"]["step"].tolist() == [0, 10, 20, 30, 40, 50]
    assert lines["trials/0011"]["step"].tolist() == [0, 10]
    assert set(lines["trials/0010"]["status"]) == {"FAILED"}


def test_curves_of_a_single_run_have_no_legend_to_need(tmp_path: Path) -> None:
    found = Experiment.open(write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9)))
    plot = learning_curves.data(found)[0]
    assert plot.data.best_name is None
    assert b"the best" not in render(partial(learning_curves.draw, plot.data), Look(), "svg")


def test_a_peak_before_the_end_is_said(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    rows = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows.insert(-1, '{"step": 45, "eval/accuracy": 0.96875}\n')
    (path / "metrics.jsonl").write_text("".join(rows))
    assert "(its best evaluation was 0.969 at step 45)" in learning_curves.data(Experiment.open(path))[0].reading


def test_rates_show_the_last_score_of_what_did_not_complete(experiment: Experiment) -> None:
    plot = lr_basin.data(experiment)[0]
    points = plot.data.points
    assert len(points) == 12
    assert points["status"].value_counts().to_dict() == {"COMPLETE": 9, "RUNNING": 1, "FAILED": 1, "PRUNED": 1}
    assert points[points["status"] == "FAILED"]["score"].tolist() == pytest.approx([0.99], abs=1e-3)
    assert plot.reading == "1e-5 too low, 3e-4 to 1e-3 good (best 1e-3), 1e-2 too high."
    svg = render(partial(lr_basin.draw, plot.data), Look(), "svg").decode()
    for text in ("too low", "too high", "rank 1", "rank 8", "failed: last score", "pruned or running: last score"):
        assert text in svg


def test_full_fine_tuning_is_kept_out_of_loras_band(tmp_path: Path) -> None:
    overrides = ["trainer.policy.model.lora.sync=merge"]
    rates = [(0, 1e-5, 0.9), (0, 1e-4, 0.3), (8, 1e-4, 0.4), (8, 1e-3, 0.9), (8, 1e-2, 0.4)]
    trials = [Trial(i, 0, params(rank, lr), score) for i, (rank, lr, score) in enumerate(rates)]
    found = Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0], overrides=overrides)))
    reading = lr_basin.data(found)[0].reading
    assert reading.startswith("LoRA, all ranks together: 1e-4 too low, 1e-3 good, 1e-2 too high.")


def test_no_rates_figure_when_the_rate_was_not_swept(tmp_path: Path) -> None:
    trials = [Trial(i, 0, params(rank, 1e-3), 0.5) for i, rank in enumerate((1, 8))]
    assert lr_basin.data(Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0])))) == []


def test_sides_by_target_modules_then_rank(experiment: Experiment) -> None:
    targets, ranks = score_by_axis.data(experiment)
    assert (targets.data.key, ranks.data.key) == (TARGETS, RANK)
    assert targets.data.means.to_dict() == pytest.approx(
        {"all-linear": 0.7281, '["q_proj", "v_proj"]': 0.8105}, abs=1e-3
    )
    assert ranks.data.tops.to_dict() == pytest.approx({1: 0.8105, 8: 0.9102}, abs=1e-3)
    assert targets.reading.startswith(
        "Best configuration of each: 0.910 with all-linear (7 trials) and 0.811 with q_proj, v_proj (2 trials)."
    )


def test_full_fine_tuning_has_no_side_among_targets(tmp_path: Path) -> None:
    overrides = ["trainer.policy.model.lora.sync=merge"]
    trials = [
        Trial(0, 0, params(0, 1e-4), 0.9),
        Trial(1, 0, params(8, 1e-3, targets="mlp"), 0.8),
        Trial(2, 0, params(8, 1e-3, targets="all-linear"), 0.7),
    ]
    found = Experiment.open(write_sweep(tmp_path, Sweep(trials, seeds=[0], overrides=overrides)))
    targets, ranks = score_by_axis.data(found)
    assert targets.data.tops.to_dict() == pytest.approx({"mlp": 0.8, "all-linear": 0.7}, abs=1e-3)
    assert ranks.data.tops.to_dict() == pytest.approx({0: 0.9, 8: 0.8}, abs=1e-3)
