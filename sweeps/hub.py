"""The process in which trials train as members of one pack: a Ray actor that each trial's own process asks to go on."""

from __future__ import annotations

import os
import threading
import time
import traceback
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from harness import recipe as recipes
from harness.rundir import RunDir, Status
from rltrain.quiet import quiet_libraries, redirect_output
from sweeps.locks import KernelLock
from sweeps.watch import stop_watching, watch

if TYPE_CHECKING:
    from rltrain.member import Member
    from rltrain.pack import Pack
    from rltrain.report import Report
    from rltrain.trainer import Course

# A killed sweep's process may live on for some seconds: how long its successor waits for it to let go of a directory.
TAKEOVER_SECONDS = 60.0
EVALUATED = "eval/accuracy"


class Stage(Enum):
    """Where a trial stands; one that waits has been evaluated, and may be pruned."""

    JOINING = "joining"
    TRAINING = "training"
    WAITING = "waiting"
    ENDED = "ended"


@dataclass(eq=False)
class Seat:
    """A trial in the hub; `reports` are those that its process has not seen yet."""

    run_dir: RunDir
    stage: Stage = Stage.JOINING
    reports: list[Report] = field(default_factory=list)
    lock: KernelLock | None = None
    member: Member | None = None
    course: Course | None = None

    def add(self, report: Report) -> None:
        """Keep a report, and see what it means."""
        self.reports.append(report)
        if report.done:
            self.stage = Stage.ENDED
        elif EVALUATED in report.metrics:
            self.stage = Stage.WAITING


class Hub:
    """A pack and the trials in it. One thread trains all that may go on, a step of each at a time; others only ask.

    Where the room is for several, an error that is nobody's own ends the process: each trial then goes on alone.
    """

    def __init__(self, first: str, room: int, log: str, stall_seconds: float) -> None:
        """`first` is the directory of a run whose recipe says what base and engine to start."""
        self._recipe = recipes.read(RunDir(first).recipe)
        self._room = room
        self._stall_seconds = stall_seconds
        self._seats: dict[str, Seat] = {}
        self._aboard: list[Seat] = []
        self._changed = threading.Condition()
        self._broken = False
        redirect_output(Path(log))
        threading.Thread(target=self._work, name="training", daemon=True).start()

    def advance(self, path: str) -> list[Report]:
        """Train a run up to its next evaluation, or its end: the reports since the last one. None at all: it failed."""
        with self._changed:
            seat = self._seats.setdefault(path, Seat(RunDir(path)))
            if seat.stage is Stage.WAITING:
                seat.stage = Stage.TRAINING
            self._changed.notify_all()
            self._changed.wait_for(lambda: seat.stage in (Stage.WAITING, Stage.ENDED))
            if seat.stage is Stage.ENDED:
                self._seats.pop(path, None)
            reports, seat.reports = seat.reports, []
            return reports

    def leave(self, path: str) -> None:
        """Take a run out of the pack before its next step, if it is still in."""
        with self._changed:
            self._seats.pop(path, None)
            self._changed.notify_all()

    def works(self) -> bool:
        """Whether trials can train here."""
        return not self._broken

    def _work(self) -> None:
        try:
            quiet_libraries()
            from rltrain.pack import Pack

            pack = Pack.open(self._recipe, room=self._room)
            pack.contains_failures = True
            while True:
                self._turn(pack)
        except Exception as error:
            traceback.print_exc()
            # What is nobody's own hits everyone: alone, each shows whether it was its doing.
            if self._room > 1 and self._aboard:
                os._exit(1)
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        """Every trial that is here, and every one that comes, fails for this reason."""
        stop_watching()
        self._broken = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._at(Stage.JOINING, Stage.TRAINING))
                for seat in self._at(Stage.JOINING, Stage.TRAINING):
                    fail(seat, error)
                self._changed.notify_all()

    def _turn(self, pack: Pack) -> None:
        """Let go of those that have left, take in those that have come, and train those that may go on by one step."""
        with self._changed:
            stop_watching()
            self._changed.wait_for(lambda: self._gone() or self._coming() or self._at(Stage.TRAINING))
            gone = self._gone()
        watch(self._stall_seconds)
        for seat in gone:
            self._let_go(pack, seat)
        for seat in self._coming():
            self._take_in(pack, seat)
        training = [seat for seat in self._aboard if seat.stage is Stage.TRAINING]
        if training:
            self._step(pack, training)
        for seat in [seat for seat in self._aboard if seat.stage is Stage.ENDED]:
            self._let_go(pack, seat)
        with self._changed:
            self._changed.notify_all()

    def _gone(self) -> list[Seat]:
        return [seat for seat in self._aboard if seat not in self._seats.values()]

    def _coming(self) -> list[Seat]:
        """Those that can be taken in now: one that has ended may be slower to leave than the next to come."""
        return self._at(Stage.JOINING)[: self._room - len(self._aboard)]

    def _at(self, *stages: Stage) -> list[Seat]:
        return [seat for seat in list(self._seats.values()) if seat.stage in stages]

    def _take_in(self, pack: Pack, seat: Seat) -> None:
        """Be the only process that writes the run's directory, and bring the run to where its training begins."""
        from rltrain.trainer import Course

        self._aboard.append(seat)
        if self._room == 1:
            redirect_output(seat.run_dir.log)
        try:
            seat.lock = own(seat.run_dir)
            seat.member = pack.join(recipes.read(seat.run_dir.recipe), seat.run_dir)
            seat.course = Course(pack, seat.member)
            for report in seat.course.begin():
                seat.add(report)
            if seat.stage is Stage.JOINING:
                seat.stage = Stage.TRAINING
        except Exception as error:
            fail(seat, error)

    def _step(self, pack: Pack, seats: list[Seat]) -> None:
        from rltrain.step import train_step

        start = time.perf_counter()
        rows = train_step(pack, [seat.member for seat in seats if seat.member])
        seconds = time.perf_counter() - start
        failures, pack.failures = pack.failures, {}
        for seat in seats:
            assert seat.member is not None
            assert seat.course is not None
            try:
                if seat.member in failures:
                    raise failures[seat.member]
                seat.add(seat.course.take(rows[seat.member], seconds))
            except Exception as error:
                fail(seat, error)
            # Now, not after the others' evaluations: meanwhile the next trial gets ready for the slot.
            with self._changed:
                self._changed.notify_all()

    def _let_go(self, pack: Pack, seat: Seat) -> None:
        self._aboard.remove(seat)
        if seat.member is not None:
            pack.leave(seat.member)
        if seat.lock is not None:
            seat.lock.release()


def own(run_dir: RunDir) -> KernelLock:
    """The lock on a run's directory, this process's until it is released; RuntimeError when another keeps it."""
    lock = KernelLock(run_dir.path / ".lock")
    if not lock.acquire(TAKEOVER_SECONDS):
        raise RuntimeError(f"another process still writes {run_dir.path}")
    return lock


def fail(seat: Seat, error: Exception) -> None:
    """A run has failed: its process is told nothing more, its directory says why."""
    record(seat.run_dir, error)
    seat.reports, seat.stage = [], Stage.ENDED


def record(run_dir: RunDir, error: Exception) -> None:
    """Write an error's traceback to the log, and its reason to the manifest unless the trainer did."""
    with run_dir.log.open("a") as log:
        log.write("".join(traceback.format_exception(error)))
    if run_dir.status not in (Status.FAILED, Status.COMPLETE):
        run_dir.fail(error)
