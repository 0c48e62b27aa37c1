"""The pack server: a Ray actor that trains trials as members of one pack."""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import recipe as recipes
from harness.config.metrics import ACCURACY
from harness.config.schema import Recipe
from harness.core.errors import MachineError, machine_error
from harness.core.locks import KernelLock
from harness.records.run_dir import RunDir, Status
from rltrain.distributed.process import exits_are_failures, quiet_libraries, redirect_output
from sweeps.execution.watchdog import stop_watching, watch

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from rltrain.report import StepReport
    from rltrain.trainer import Trainer
    from rltrain.worker_group import WorkerGroup

# A killed sweep's process may live on for seconds: how long its successor waits for a run's lock.
TAKEOVER_SECONDS = 60.0
# The next trial asks for a slot some tenths of a second after it is free. Without this wait it
# would have to wait for a whole step of the others.
HANDOVER_SECONDS = 0.3


class Stage(Enum):
    """Where a trial stands; a waiting one has been evaluated, and may be pruned."""

    JOINING = "joining"
    TRAINING = "training"
    WAITING = "waiting"
    ENDED = "ended"


@dataclass(eq=False)
class ServedTrial:
    """A trial in the server; `reports` waits for the trial's own process to fetch it.

    `machine` is set where a failure of the machine, not of the trial, ended it.
    """

    run_dir: RunDir
    recipe: Recipe
    stage: Stage = Stage.JOINING
    reports: list[StepReport] = field(default_factory=list)
    lock: KernelLock | None = None
    machine: MachineError | None = None

    def add(self, report: StepReport) -> None:
        """Keep a report, and move to the stage that it means."""
        self.reports.append(report)
        if report.done:
            self.stage = Stage.ENDED
        elif ACCURACY in report.metrics:
            self.stage = Stage.WAITING

    def fail(self, error: Exception) -> None:
        """End after an error, of the trial or of the machine; the run directory says why."""
        self.machine = record_error(self.run_dir, error)
        self.reports, self.stage = [], Stage.ENDED


class PackServer:
    """A trainer, and a queue of trials in front of its slots.

    One thread trains all trials that may train, a step at a time; calls of other processes wait.
    An error that cannot be attributed to one trial ends a process with several slots: its trials
    restart alone. Errors in a worker group never can.
    """

    def __init__(
        self,
        first: str,
        slots: int,
        log: str,
        stall_seconds: float,
        group: PlacementGroup | None = None,
    ) -> None:
        """Start the base model and engine of the recipe in the run directory `first`.

        `group` is the placement group of a worker group's ranks.
        """
        self._recipe = recipes.read(RunDir(first).recipe)
        self._slots = slots
        self._log = Path(log)
        self._group = group
        self._stall_seconds = stall_seconds
        self._trials: dict[str, ServedTrial] = {}
        self._members: list[ServedTrial] = []
        self._num_freed = 0
        self._changed = threading.Condition()
        self._broken = False
        redirect_output(self._log)
        threading.Thread(target=self._train, name="training", daemon=True).start()

    def advance(self, path: str, recipe: Recipe) -> list[StepReport]:
        """Train a run to its next evaluation, or its end.

        Returns:
            The reports since the last call; none where the run failed.

        Raises:
            MachineError: the machine failed, not the run.
        """
        with self._changed:
            trial = self._trials.setdefault(path, ServedTrial(RunDir(path), recipe))
            if trial.stage is Stage.WAITING:
                trial.stage = Stage.TRAINING
            self._changed.notify_all()
            self._changed.wait_for(lambda: trial.stage in (Stage.WAITING, Stage.ENDED))
            if trial.stage is Stage.ENDED:
                self._trials.pop(path, None)
            if trial.machine is not None:
                raise trial.machine
            reports, trial.reports = trial.reports, []
            return reports

    def leave(self, path: str) -> None:
        """Remove a run from the pack before the next step, if it is still in."""
        with self._changed:
            self._trials.pop(path, None)
            self._changed.notify_all()

    def works(self) -> bool:
        """Return whether trials can train here."""
        return not self._broken

    def _train(self) -> None:
        try:
            with exits_are_failures():  # or this thread would end, and trials wait for ever
                quiet_libraries()
                trainer = self._open_trainer()
                while True:
                    self._turn(trainer)
        except Exception as error:
            traceback.print_exc()
            # Each trial restarts alone, and shows whether it was the cause.
            if self._slots > 1 and self._members:
                os._exit(1)
            self._refuse(error)

    def _open_trainer(self) -> Trainer | WorkerGroup:
        """Return the trainer, which ends with this process."""
        from rltrain.worker_group import open_trainer

        trainer = open_trainer(self._recipe, slots=self._slots, log=self._log, group=self._group)
        return trainer.__enter__()

    def _refuse(self, error: Exception) -> None:
        """Fail all trials in the server, and all that join later, with this error."""
        stop_watching()
        self._broken = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._at(Stage.JOINING, Stage.TRAINING))
                for trial in self._at(Stage.JOINING, Stage.TRAINING):
                    trial.fail(error)
                self._changed.notify_all()

    def _turn(self, trainer: Trainer | WorkerGroup) -> None:
        """Remove trials that left, add trials that wait for a slot, take one step of the rest."""
        with self._changed:
            stop_watching()
            self._changed.wait_for(
                lambda: len(self._joining()) >= self._num_freed, HANDOVER_SECONDS
            )
            self._num_freed = 0
            self._changed.wait_for(
                lambda: self._left() or self._joining() or self._at(Stage.TRAINING)
            )
            left = self._left()
        watch(self._stall_seconds)
        for trial in left:
            self._remove(trainer, trial)
        for trial in self._joining():
            self._add(trainer, trial)
        training = [trial for trial in self._members if trial.stage is Stage.TRAINING]
        if training:
            outcomes = trainer.step([trial.run_dir for trial in training])
            for trial in training:
                outcome = outcomes[trial.run_dir.path]
                if isinstance(outcome, Exception):
                    trial.fail(outcome)
                else:
                    trial.add(outcome)
            # Before the ended ones are removed: the next trial prepares for the slot meanwhile.
            with self._changed:
                self._changed.notify_all()
        for trial in [trial for trial in self._members if trial.stage is Stage.ENDED]:
            self._remove(trainer, trial)
        with self._changed:
            self._changed.notify_all()

    def _left(self) -> list[ServedTrial]:
        return [trial for trial in self._members if trial not in self._trials.values()]

    def _joining(self) -> list[ServedTrial]:
        """Return the trials for which there is a slot now."""
        return self._at(Stage.JOINING)[: self._slots - len(self._members)]

    def _at(self, *stages: Stage) -> list[ServedTrial]:
        return [trial for trial in list(self._trials.values()) if trial.stage in stages]

    def _add(self, trainer: Trainer | WorkerGroup, trial: ServedTrial) -> None:
        """Lock the trial's directory for this process, and add the trial to the pack."""
        self._members.append(trial)
        if self._slots == 1:
            redirect_output(trial.run_dir.log)
        try:
            with exits_are_failures():
                trial.lock = acquire_lock(trial.run_dir)
                for report in trainer.add(trial.recipe, trial.run_dir):
                    trial.add(report)
        except Exception as error:
            if not trainer.isolates_failures:
                raise
            trial.fail(error)
        if trial.stage is Stage.JOINING:
            trial.stage = Stage.TRAINING

    def _remove(self, trainer: Trainer | WorkerGroup, trial: ServedTrial) -> None:
        self._members.remove(trial)
        self._num_freed += 1
        trainer.remove(trial.run_dir)
        if trial.lock is not None:
            trial.lock.release()


def acquire_lock(run_dir: RunDir) -> KernelLock:
    """Acquire the lock on a run's directory; raises RuntimeError when another process keeps it."""
    lock = KernelLock(run_dir.path / ".lock")
    if not lock.acquire(TAKEOVER_SECONDS):
        raise RuntimeError(f"another process still writes {run_dir.path}")
    return lock


def record_error(run_dir: RunDir, error: Exception) -> MachineError | None:
    """Write an error's traceback to the run's log and, unless the trainer did, fail the run.

    Returns the machine's failure, if it was one. A full disk may keep the directory from saying so.
    """
    with contextlib.suppress(OSError), run_dir.log.open("a") as log:
        log.write("".join(traceback.format_exception(error)))
    machine = machine_error(error, writes=[run_dir.path])
    if machine is None and run_dir.status not in (Status.FAILED, Status.COMPLETE):
        run_dir.fail(error)
    return machine
