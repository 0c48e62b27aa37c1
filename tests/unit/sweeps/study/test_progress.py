"""Test the progress of a sweep: lines, the table on a terminal, and the time left."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from harness.records.metrics_file import MetricsFile
from sweeps.study import progress as module
from sweeps.study import trials
from sweeps.study.progress import Progress
from sweeps.study.study import Study
from tests.unit.sweeps.curves import LR, RANK, begin, recipe_of


class Clock:
    """A clock that tests set."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_the_time_left_follows_the_trials_so_far(tmp_path: Path, clock: Clock) -> None:
    space = {RANK: {"choices": [1, 8]}, LR: {"low": 1e-5, "high": 1e-2, "log": True}}
    plan, sweep_dir = begin(recipe_of(space, num_trials=5, max_concurrent=2), tmp_path)
    study = Study(sweep_dir.journal, plan)
    text = io.StringIO()
    progress = Progress(study, Console(file=text, width=200))
    for _ in range(2):
        trial = study.ask()
        assert trial is not None
        progress.began(trial, trials.create(plan, trial, sweep_dir)[0])
    progress.evaluated(0, 0, 4, 0.25)  # the base
    assert progress.seconds_left() is None
    clock.now += 30
    progress.evaluated(0, 2, 4, 0.375)
    # Half way after 30 s: five trials of 60 s in two slots, and two have run for 30 s.
    assert progress.seconds_left() == 120
    assert (
        text.getvalue().splitlines()[-1]
        == "trial 0 at step 2 of 4: eval/accuracy 0.375  [30 s, ETA 2 min 00 s]"
    )
    clock.now += 30
    study.complete(0, 0.5, 4)
    progress.ended(0, 0.5)
    # Four trials of 60 s are left in two slots; the running one has had its 60 s.
    assert progress.seconds_left() == 90
    last = text.getvalue().splitlines()[-1]
    assert last.startswith(
        "  1 complete, 0 pruned, 0 failed, 4 left of 5  [1 min 00 s, ETA 1 min 30 s]"
    )
    assert "best so far 0.5000 (trial 0: rank=" in last


def test_the_table_shows_running_trials(tmp_path: Path) -> None:
    plan, sweep_dir = begin(
        recipe_of({RANK: {"choices": [1, 8]}}, num_trials=1, first_trials=[{RANK: 8}]), tmp_path
    )
    study = Study(sweep_dir.journal, plan)
    trial = study.ask()
    assert trial is not None
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with Progress(study, console) as progress:
        run_dir = trials.create(plan, trial, sweep_dir)[0]
        progress.began(trial, run_dir)
        progress.evaluated(trial.number, 2, 4, 0.5)
        MetricsFile(run_dir.metrics).append({"step": 3, "eval/accuracy": 0.625})
        shown = Console(file=io.StringIO(), width=200)
        shown.print(progress.render())
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split() == ["trial", "rank", "seed", "step", "eval/accuracy", "time"]
    assert lines[1].split()[:5] == ["0", "8", "0", "3/4", "0.6250"]
    assert "0 complete, 0 pruned, 0 failed, 1 left of 1" in lines[2]
    # On a terminal the table has the counts, which otherwise follow each line.
    assert "left of" not in console.file.getvalue().split("trial 0 begins")[0]  # type: ignore[attr-defined]
