from __future__ import annotations

from pathlib import Path

import pytest

from analysis.report.write import watch
from harness.core.errors import UserError
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from tests.unit.analysis.synthetic import Sweep, Trial, params, write_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> RunDir:
    """A sweep that runs, with one trial that does."""
    trial = Trial(0, 0, params(8, 1e-3), 0.9, Status.RUNNING)
    return RunDir(write_sweep(tmp_path, Sweep([trial], status=Status.RUNNING)))


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds slept, at once."""
    seconds: list[float] = []
    monkeypatch.setattr("analysis.report.write.time.sleep", seconds.append)
    return seconds


def test_the_page_is_written_at_each_change_until_the_sweep_ends(
    sweep: RunDir, slept: list[float]
) -> None:
    calls: list[int | None] = []

    def write(refresh: int | None) -> int:
        calls.append(refresh)
        if len(calls) == 1:  # something new while the first page is written
            MetricsFile(sweep.trial(0).metrics).append({"step": 55, "reward": 1.0})
        if len(calls) == 2:
            sweep.trial(0).move_to(Status.COMPLETE)
            sweep.move_to(Status.COMPLETE)
        return len(calls)

    told: list[int] = []
    assert watch(write, [sweep.path], every=2, begun=told.append) == 3
    assert calls == [2, 2, None]
    assert slept == [2, 2]
    assert told == [1], "the first alone"


def test_nothing_new_is_not_written_again(
    sweep: RunDir, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("analysis.report.write.time.sleep", sleep)
    calls: list[int | None] = []
    watch(calls.append, [sweep.path])
    assert calls == [5, None], "the second at Ctrl-C: a page that no longer reloads itself"


def test_all_of_several_sweeps_must_have_ended(
    sweep: RunDir, tmp_path: Path, slept: list[float]
) -> None:
    done = write_sweep(tmp_path / "other", Sweep([], status=Status.COMPLETE))
    calls: list[int | None] = []

    def write(refresh: int | None) -> None:
        calls.append(refresh)
        if refresh:
            sweep.move_to(Status.FAILED, reason="stopped")

    watch(write, [done, sweep.path])
    assert calls == [5, None]


def test_what_has_ended_is_written_once_and_no_time_is_refused(
    sweep: RunDir, slept: list[float]
) -> None:
    with pytest.raises(UserError, match="every so many seconds"):
        watch(print, [sweep.path], every=0)
    sweep.move_to(Status.COMPLETE)
    assert watch(lambda refresh: refresh, [sweep.path]) is None
    assert slept == []


def test_drawing_leaves_the_sweep_four_fifths_of_a_core(
    sweep: RunDir, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("analysis.report.write.time.monotonic", lambda: clock[0])

    def write(refresh: int | None) -> None:
        clock[0] += 10
        if refresh:
            sweep.move_to(Status.COMPLETE)

    watch(write, [sweep.path])
    assert slept == [40]
