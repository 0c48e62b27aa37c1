"""The process that trains trials as members of one pack, itself or with ranks: a Ray actor that
each trial asks.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import recipe as recipes
from harness.core.errors import MachineError, machine_error
from harness.core.locks import KernelLock
from harness.records.run_dir import RunDir, Status
from rltrain.distributed.placement import needs_workers
from rltrain.distributed.process import exits_are_failures, quiet_libraries, redirect_output
from sweeps.execution.watchdog import stop_watching, watch

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from rltrain.crew import Crew
    from rltrain.report import Report

# A killed sweep's process may live on for some seconds: how long its successor waits for it to let
# go of a directory.
TAKEOVER_SECONDS = 60.0
# The next trial asks for a slot a tenth or two of a second after it is free; unawaited, it would
# wait for a whole step.
HANDOVER_SECONDS = 0.3
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
    machine: MachineError | None = None
    """What of the machine failed, where that ended the trial here."""

    def add(self, report: Report) -> None:
        """Keep a report, and see what it means."""
        self.reports.append(report)
        if report.done:
            self.stage = Stage.ENDED
        elif EVALUATED in report.metrics:
            self.stage = Stage.WAITING


class Hub:
    """A pack and the trials in it. One thread trains all that may go on, a step of each at a time;
    others only ask.

    Where the room is for several, an error that is nobody's own ends the process: each trial then
    goes on alone. Among ranks every error is such a one.
    """

    def __init__(
        self,
        first: str,
        room: int,
        log: str,
        stall_seconds: float,
        group: PlacementGroup | None = None,
    ) -> None:
        """`first` is the directory of a run whose recipe says what base and engine to start;
        `group` is the ranks'.
        """
        self._recipe = recipes.read(RunDir(first).recipe)
        self._room = room
        self._log = Path(log)
        self._group = group
        self._stall_seconds = stall_seconds
        self._seats: dict[str, Seat] = {}
        self._aboard: list[Seat] = []
        self._freed = 0
        self._changed = threading.Condition()
        self._broken = False
        redirect_output(self._log)
        threading.Thread(target=self._work, name="training", daemon=True).start()

    def advance(self, path: str) -> list[Report]:
        """Train a run up to its next evaluation, or its end: the reports since the last one. None
        at all: it failed.

        Raises MachineError where not the run but the machine failed.
        """
        with self._changed:
            seat = self._seats.setdefault(path, Seat(RunDir(path)))
            if seat.stage is Stage.WAITING:
                seat.stage = Stage.TRAINING
            self._changed.notify_all()
            self._changed.wait_for(lambda: seat.stage in (Stage.WAITING, Stage.ENDED))
            if seat.stage is Stage.ENDED:
                self._seats.pop(path, None)
            if seat.machine is not None:
                raise seat.machine
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
            with exits_are_failures():  # else this thread would end, and the trials wait for ever
                quiet_libraries()
                crew = self._start()
                while True:
                    self._turn(crew)
        except Exception as error:
            traceback.print_exc()
            # What is nobody's own hits everyone: alone, each shows whether it was its doing.
            if self._room > 1 and self._aboard:
                os._exit(1)
            self._refuse(error)

    def _start(self) -> Crew:
        """Base and engine: in this process, or in ranks that this one leads."""
        if needs_workers(self._recipe):
            from rltrain.worker_group import WorkerGroup

            return WorkerGroup(self._recipe, self._room, self._log, self._group).__enter__()
        from rltrain.crew import LocalCrew
        from rltrain.pack import Pack

        return LocalCrew(Pack.open(self._recipe, room=self._room))

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

    def _turn(self, crew: Crew) -> None:
        """Let go of those that have left, take in those that have come, and train those that may go
        on by one step.
        """
        with self._changed:
            stop_watching()
            self._changed.wait_for(lambda: len(self._coming()) >= self._freed, HANDOVER_SECONDS)
            self._freed = 0
            self._changed.wait_for(
                lambda: self._gone() or self._coming() or self._at(Stage.TRAINING)
            )
            gone = self._gone()
        watch(self._stall_seconds)
        for seat in gone:
            self._let_go(crew, seat)
        for seat in self._coming():
            self._take_in(crew, seat)
        training = [seat for seat in self._aboard if seat.stage is Stage.TRAINING]
        if training:
            self._step(crew, training)
        for seat in [seat for seat in self._aboard if seat.stage is Stage.ENDED]:
            self._let_go(crew, seat)
        with self._changed:
            self._changed.notify_all()

    def _gone(self) -> list[Seat]:
        return [seat for seat in self._aboard if seat not in self._seats.values()]

    def _coming(self) -> list[Seat]:
        """Those that can be taken in now: one that has ended may be slower to leave than the next
        to come.
        """
        return self._at(Stage.JOINING)[: self._room - len(self._aboard)]

    def _at(self, *stages: Stage) -> list[Seat]:
        return [seat for seat in list(self._seats.values()) if seat.stage in stages]

    def _take_in(self, crew: Crew, seat: Seat) -> None:
        """Be the only process that writes the run's directory, and bring the run to where its
        training begins.
        """
        self._aboard.append(seat)
        if self._room == 1:
            redirect_output(seat.run_dir.log)
        with self._own_failure(crew, seat):
            seat.lock = own(seat.run_dir)
            for report in crew.take_in(recipes.read(seat.run_dir.recipe), seat.run_dir):
                seat.add(report)
            if seat.stage is Stage.JOINING:
                seat.stage = Stage.TRAINING

    def _step(self, crew: Crew, seats: list[Seat]) -> None:
        crew.train([seat.run_dir for seat in seats])
        for seat in seats:
            with self._own_failure(crew, seat):
                seat.add(crew.take(seat.run_dir))
            # Now, not after the others' evaluations: meanwhile the next trial gets ready for the
            # slot.
            with self._changed:
                self._changed.notify_all()

    def _let_go(self, crew: Crew, seat: Seat) -> None:
        self._aboard.remove(seat)
        self._freed += 1
        crew.let_go(seat.run_dir)
        if seat.lock is not None:
            seat.lock.release()

    @contextlib.contextmanager
    def _own_failure(self, crew: Crew, seat: Seat) -> Iterator[None]:
        """What fails inside is the seat's failure alone, where the others can go on without it."""
        try:
            with exits_are_failures():
                yield
        except Exception as error:
            if not crew.contains_failures:
                raise
            fail(seat, error)


def own(run_dir: RunDir) -> KernelLock:
    """The lock on a run's directory, this process's until it is released; RuntimeError when another
    keeps it.
    """
    lock = KernelLock(run_dir.path / ".lock")
    if not lock.acquire(TAKEOVER_SECONDS):
        raise RuntimeError(f"another process still writes {run_dir.path}")
    return lock


def fail(seat: Seat, error: Exception) -> None:
    """A run has failed, or the machine under it: its process is told nothing more, its directory
    says why.
    """
    seat.machine = record(seat.run_dir, error)
    seat.reports, seat.stage = [], Stage.ENDED


def record(run_dir: RunDir, error: Exception) -> MachineError | None:
    """Write an error's traceback to the log, and its reason to the manifest unless the trainer did.

    Returns what of the machine failed, None where it was the run: the disk may be full, and the
    directory not say so.
    """
    with contextlib.suppress(OSError), run_dir.log.open("a") as log:
        log.write("".join(traceback.format_exception(error)))
    machine = machine_error(error, writes=[run_dir.path])
    if machine is None and run_dir.status not in (Status.FAILED, Status.COMPLETE):
        run_dir.fail(error)
    return machine
