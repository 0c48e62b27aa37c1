"""How a trial's fate gets into the study, its directory and the console: every way one can end,
without Ray.
"""

from __future__ import annotations

import io
import math
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from harness.config import recipe as recipes
from harness.core.errors import NO_MEMORY, MachineError
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from sweeps.execution import controller as controllers
from sweeps.execution.controller import StopSweep, TrialController
from sweeps.study import trials
from sweeps.study.progress import Progress
from sweeps.study.study import Study
from tests.unit.sweeps.curves import begin, recipe_of
from tests.unit.sweeps.execution.test_server_pool import Processes


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def controller(tmp_path: Path, said: io.StringIO) -> TrialController:
    plan, sweep_dir = begin(
        recipe_of(max_concurrent=2, pruner={"name": "median", "n_startup_trials": 1}), tmp_path
    )
    study = Study(sweep_dir.journal, plan)
    return TrialController(
        sweep_dir, study, Progress(study, Console(file=said, width=200)), Processes()
    )


def start(controller: TrialController, name: str) -> RunDir:
    config = controller.begin(name)
    assert config is not None
    run_dir = RunDir(config["run_dir"])
    run_dir.move_to(Status.RUNNING)
    return run_dir


def log(run_dir: RunDir, step: int, value: float) -> None:
    MetricsFile(run_dir.metrics).append({"step": step, "eval/accuracy": value})


def finish(controller: TrialController, name: str, value: float) -> RunDir:
    run_dir = start(controller, name)
    for step in (1, 4):
        controller.report(name, step, 4, value)
        log(run_dir, step, value)
    run_dir.move_to(Status.COMPLETE, result={"step": 4})
    controller.end(name, died=False)
    return run_dir


def test_a_complete_trial(controller: TrialController, said: io.StringIO) -> None:
    finish(controller, "a", 0.75)
    record = controller.study.trials()[0]
    assert (record.state.name, record.value, record.intermediate_values) == (
        "COMPLETE",
        0.75,
        {1: 0.75, 4: 0.75},
    )
    assert "trial 0 complete: eval/accuracy 0.75" in said.getvalue()


def test_time_adds_up_over_processes(controller: TrialController) -> None:
    controller.sweep_dir.update(seconds=100.0)
    again = TrialController(
        controller.sweep_dir, controller.study, controller.progress, Processes()
    )
    finish(again, "a", 0.5)
    assert 100 < controller.sweep_dir.read_manifest()["seconds"] < 200


def test_no_more_trials_at_once_than_asked_for(controller: TrialController) -> None:
    start(controller, "a")
    start(controller, "b")
    assert controller.begin("c") is None
    assert not controller.over


def test_a_pruned_trial(controller: TrialController, said: io.StringIO) -> None:
    finish(controller, "a", 0.75)
    run_dir = start(controller, "b")
    assert not controller.report("b", 0, 4, 0.1)  # the base model: nothing to prune by
    assert controller.report("b", 1, 4, 0.25)
    controller.end("b", died=False)
    reason = "pruned at step 1: eval/accuracy 0.25 by MedianPruner"
    assert (run_dir.status, run_dir.read_manifest()["reason"]) == (Status.PRUNED, reason)
    assert controller.study.trials()[1].state.name == "PRUNED"
    assert f"trial 1 {reason}" in said.getvalue()


def test_a_trial_that_raised(controller: TrialController, said: io.StringIO) -> None:
    run_dir = start(controller, "a")
    run_dir.move_to(Status.FAILED, reason="step 2: ValueError: no luck")
    controller.end("a", died=True)
    record = controller.study.trials()[0]
    assert (record.state.name, record.user_attrs["reason"]) == (
        "FAIL",
        "step 2: ValueError: no luck",
    )
    assert "trial 0 failed: step 2: ValueError: no luck" in said.getvalue()
    start(controller, "b")
    start(controller, "c")


def test_a_trial_whose_process_died(controller: TrialController) -> None:
    run_dir = start(controller, "a")
    controller.end("a", died=True)
    assert run_dir.status is Status.FAILED
    assert "the trial's process died" in run_dir.read_manifest()["reason"]
    assert controller.study.trials()[0].state.name == "FAIL"


def test_a_failure_of_the_machine_stops_the_sweep_and_its_trial_goes_on_later(
    controller: TrialController,
) -> None:
    run_dir = start(controller, "a")
    with pytest.raises(StopSweep) as stop:
        controller.end(
            "a", died=False, machine=MachineError("a file cannot be written", fix="make room")
        )
    assert "make room" in str(stop.value.error)
    start(controller, "b")
    controller.note_error("b", RuntimeError("The actor died because its node has died."))
    with pytest.raises(StopSweep, match="a node of the Ray cluster was lost"):
        controller.end("b", died=True)
    assert run_dir.status is Status.RUNNING
    assert controller.study.counts() == {"RUNNING": 2}
    again = TrialController(
        controller.sweep_dir,
        Study(controller.sweep_dir.journal, controller.study.plan),
        controller.progress,
        Processes(),
    )
    assert start(again, "c").path == run_dir.path


def test_a_trial_that_the_kernel_ends_twice_for_want_of_memory_fails(
    controller: TrialController, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = count(1 << 40)
    monkeypatch.setattr(
        controllers, "oom_kills", lambda: next(kills)
    )  # no test may have the kernel kill
    run_dir = start(controller, "a")
    with pytest.raises(StopSweep, match=NO_MEMORY):
        controller.end("a", died=True)
    again = TrialController(
        controller.sweep_dir,
        Study(controller.sweep_dir.journal, controller.study.plan),
        controller.progress,
        Processes(),
    )
    assert start(again, "b").path == run_dir.path
    again.end("b", died=True)
    assert again.study.trials()[0].user_attrs["reason"].startswith(f"{NO_MEMORY} a second time")


def test_a_trial_whose_metric_is_nan(controller: TrialController) -> None:
    run_dir = finish(controller, "a", math.nan)
    assert controller.study.trials()[0].state.name == "FAIL"
    assert run_dir.read_manifest()["reason"] == "eval/accuracy is nan at step 4"


def test_a_trial_that_logged_nothing(controller: TrialController) -> None:
    run_dir = start(controller, "a")
    run_dir.move_to(Status.COMPLETE)
    controller.end("a", died=False)
    assert controller.study.trials()[0].user_attrs["reason"] == "the run logged no eval/accuracy"


def test_it_ends_when_no_trial_is_left(controller: TrialController) -> None:
    for name in "abcd":
        finish(controller, name, 0.5)
    assert controller.begin("e") is None
    assert controller.study.num_left == 0


def test_failures_in_a_row_stop_the_sweep(tmp_path: Path, said: io.StringIO) -> None:
    plan, sweep_dir = begin(recipe_of(num_trials=9, max_failures=2, max_concurrent=2), tmp_path)
    controller = TrialController(
        sweep_dir,
        study := Study(sweep_dir.journal, plan),
        Progress(study, Console(file=said, width=200)),
        Processes(),
    )

    def fail(name: str) -> None:
        start(controller, name).move_to(Status.FAILED, reason="MemoryError: no room")
        controller.end(name, died=True)

    fail("a")
    finish(controller, "b", 0.5)
    fail("c")
    running = start(controller, "d")
    fail("e")
    assert study.stopped is None  # one that runs may yet end well
    fail("g")
    assert (
        study.stopped
        == "2 trials failed in a row (sweep.max_failures); the last: MemoryError: no room"
    )
    assert controller.begin("f") is None
    # What runs already runs to its end.
    log(running, 4, 0.75)
    running.move_to(Status.COMPLETE, result={"step": 4})
    controller.end("d", died=False)
    assert study.counts() == {"FAIL": 4, "COMPLETE": 2}
    assert not study.finished


def test_no_trial_begins_once_the_inputs_have_changed(tmp_path: Path, said: io.StringIO) -> None:
    """Not even one whose directory was made before: it would be trained on what its manifest does
    not name.
    """
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n" * 128)
    files = {"data.train_data": [str(data)], "data.val_data": [str(data)]}
    plan, sweep_dir = begin(
        recipes.with_values(recipe_of(max_concurrent=2), files), tmp_path / "sweep"
    )
    study = Study(sweep_dir.journal, plan)
    controller = TrialController(
        sweep_dir, study, Progress(study, Console(file=said, width=200)), Processes()
    )
    first = start(controller, "a")
    data.write_text("{}\n" * 129)
    assert controller.begin("b") is None
    assert study.stopped is not None
    assert study.stopped.startswith(f"the sweep's inputs changed: data {data}: sha256:")
    assert not controller.over
    first.move_to(Status.COMPLETE, result={"step": 4})
    log(first, 4, 0.5)
    controller.end("a", died=False)
    assert controller.over
    assert study.trials()[0].value == 0.5


def test_a_trial_that_hung_is_told_from_one_that_died(controller: TrialController) -> None:
    for name, last_words in (
        ("a", "Timeout (0:00:01)!\nThread 0x1 (most recent call first):\n"),
        ("b", "Killed\n"),
    ):
        run_dir = start(controller, name)
        run_dir.log.write_text(f"step 1\n{last_words}")
        controller.end(name, died=True)
    hung, died = (controller.sweep_dir.trial(number).read_manifest()["reason"] for number in (0, 1))
    assert hung == "no report for 3600 s (sweep.stall_seconds): it hung and was ended; see log.txt"
    assert "process died" in died


def test_trials_whose_pack_died_go_on_alone_and_are_judged_by_that(
    tmp_path: Path, said: io.StringIO
) -> None:
    plan, sweep_dir = begin(recipe_of(num_trials=3, max_concurrent=1, pack_size=2), tmp_path)
    study, servers = Study(sweep_dir.journal, plan), Processes()
    controller = TrialController(
        sweep_dir, study, Progress(study, Console(file=said, width=200)), servers
    )
    runs = [start(controller, name) for name in "ab"]
    assert servers.slots == {"pack0": 2}
    servers.end("pack0")
    for name in "ab":
        controller.end(name, died=True)
    assert study.counts() == {"RUNNING": 2}
    assert (
        "trial 0: its pack's process died; it resumes from its checkpoint, alone" in said.getvalue()
    )
    assert not controller.over

    assert start(controller, "c").path == runs[0].path
    assert servers.slots == {"pack0": 2, "pack1": 1}
    assert controller.begin("d") is None  # alone is alone
    servers.end("pack1")
    controller.end("c", died=True)
    assert "the trial's process died" in runs[0].read_manifest()["reason"]
    assert start(controller, "d").path == runs[1].path
    log(runs[1], 4, 0.5)
    runs[1].move_to(Status.COMPLETE, result={"step": 4})
    controller.end("d", died=False)
    finish(controller, "e", 0.75)
    assert servers.slots == {"pack0": 2, "pack1": 1, "pack2": 1, "pack3": 2}
    assert study.counts() == {"FAIL": 1, "COMPLETE": 2}
    assert controller.begin("f") is None
    assert controller.over


def fates(folder: Path, *, lost: bool) -> list[str]:
    """How six trials end that train three in a pack, each at its value; `lost`: the pack's process
    dies at step 2.
    """
    values = [0.9, 0.5, 0.7, 0.6, 0.8, 0.4]
    pruner = {"name": "median", "n_startup_trials": 1}
    plan, sweep_dir = begin(
        recipe_of(num_trials=6, max_concurrent=1, pack_size=3, pruner=pruner), folder
    )
    study, servers = Study(sweep_dir.journal, plan), Processes()
    controller = TrialController(
        sweep_dir, study, Progress(study, Console(file=io.StringIO())), servers
    )
    names, steps = count(), dict.fromkeys(range(6), 0)
    trained: dict[str, int] = {}

    def advance(name: str) -> None:
        """One step of a trial, and its evaluation."""
        number, run_dir = trained[name], sweep_dir.trial(trained[name])
        steps[number] += 1
        if steps[number] > trials.last_step(run_dir):  # else it was logged before its process died
            log(run_dir, steps[number], values[number])
        if steps[number] == 4:
            run_dir.move_to(Status.COMPLETE, result={"step": 4})
        elif not controller.report(name, steps[number], 4, values[number]):
            return
        del trained[name]
        controller.end(name, died=False)

    while True:
        while (config := controller.begin(name := f"tune{next(names)}")) is not None:
            run_dir = RunDir(config["run_dir"])
            run_dir.move_to(Status.RUNNING)
            trained[name] = int(run_dir.path.name)
        if not trained:
            return [record.state.name for record in study.trials()]
        for name in list(trained):
            advance(name)
        if lost and steps[0] == 2:
            lost = False
            servers.end("pack0")
            for name in list(trained):
                steps[trained.pop(name)] = 0  # no checkpoint: it starts again
                controller.end(name, died=True)


def test_a_lost_pack_changes_nothing_in_what_the_pruner_decides(tmp_path: Path) -> None:
    undisturbed = fates(tmp_path / "whole", lost=False)
    assert undisturbed == ["COMPLETE"] * 3 + ["PRUNED", "COMPLETE", "PRUNED"]
    assert fates(tmp_path / "lost", lost=True) == undisturbed
