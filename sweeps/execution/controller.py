"""The controller of a sweep's trials: study, directories, pack servers and Ray Tune meet here.

Knows nothing of Ray.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.core.errors import NO_MEMORY, MachineError, machine_error
from harness.records.manifest import changed_inputs
from harness.records.run_dir import RunDir, Status
from sweeps.execution.server_pool import PackServers, ServerPool
from sweeps.execution.watchdog import hung, oom_kills
from sweeps.study import trials
from sweeps.study.progress import Progress
from sweeps.study.study import Study, Trial

DIED = "the trial's process died: killed, out of memory, or crashed"
# Trials that were asked for and wait for a slot.
MOST_WAITING = 8


class StopSweep(BaseException):
    """Ends a sweep at once, its running trials left RUNNING.

    Not an Exception, which Tune would attribute to a trial.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A trial that waits for a slot; `alone`: in a server without other trials."""

    trial: Trial
    run_dir: RunDir
    recipe: Recipe
    alone: bool = False


class TrialController:
    """Starts and ends trials for Tune's searcher and scheduler, and records their results."""

    def __init__(
        self, sweep_dir: RunDir, study: Study, progress: Progress, servers: PackServers
    ) -> None:
        self.sweep_dir = sweep_dir
        self.study = study
        self.progress = progress
        self._servers = ServerPool(study.plan.recipe, servers)
        self._numbers: dict[str, int] = {}
        self._waiting: list[_Waiting] = []
        self._failed: set[int] = set()
        self._total_steps: dict[int, int] = {}
        self._machine: dict[str, MachineError] = {}
        self._oom_kills = oom_kills()
        self._started = time.monotonic()
        self._manifest = sweep_dir.read_manifest()
        self._seconds_before: float = self._manifest.get("seconds", 0.0)

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its searcher, and the journal is the state."""
        return {}

    def record_seconds(self) -> None:
        """Write the sweep's running time, over all its processes, to its manifest."""
        seconds = self._seconds_before + time.monotonic() - self._started
        self.sweep_dir.update(seconds=seconds)

    def prepare(self) -> None:
        """Start the pack servers."""
        self._servers.prepare(self.sweep_dir, self.study.num_left)

    @property
    def over(self) -> bool:
        """Whether no trial runs, and none is to come."""
        return not self._numbers and (self.study.stopped is not None or not self._waiting)

    def begin(self, tune_id: str) -> dict[str, Any] | None:
        """Start the next trial and return its config; None when none is left or has a slot."""
        if self.study.stopped is None and (changes := changed_inputs(self._manifest)):
            self.study.stopped = f"the sweep's inputs changed: {'; '.join(map(str, changes))}"
        admitted = None if self.study.stopped else self._admit_next()
        if admitted is None:
            return None
        waiting, server = admitted
        self._numbers[tune_id] = waiting.trial.number
        self.progress.began(waiting.trial, waiting.run_dir)
        return {
            "run_dir": str(waiting.run_dir.path),
            "recipe": waiting.recipe,
            "metric": self.study.plan.sweep.metric,
            "server": server,
        }

    def _admit_next(self) -> tuple[_Waiting, str] | None:
        """Admit a waiting trial, or else a new one of the study's, to a pack server."""
        for waiting in self._waiting:
            if (server := self._admit(waiting)) is not None:
                self._waiting.remove(waiting)
                return waiting, server
        # Some may wait, so that trials that must be alone do not keep packs from filling up.
        while (
            self._servers.may_have_slot
            and len(self._waiting) < MOST_WAITING
            and (trial := self.study.ask()) is not None
        ):
            run_dir, recipe = trials.create(self.study.plan, trial, self.sweep_dir)
            waiting = _Waiting(trial, run_dir, recipe)
            if (server := self._admit(waiting)) is not None:
                return waiting, server
            self._waiting.append(waiting)
        return None

    def _admit(self, waiting: _Waiting) -> str | None:
        return self._servers.admit(
            waiting.trial.number, waiting.recipe, waiting.run_dir, alone=waiting.alone
        )

    def report(self, tune_id: str, step: int, total_steps: int, value: float | None) -> bool:
        """Record an evaluation; return whether the pruner stops the trial."""
        number = self._numbers[tune_id]
        self._total_steps[number] = total_steps
        self.progress.evaluated(number, step, total_steps, value)
        # Step 0 is the base model, the same in every trial: nothing to prune by.
        reason = self.study.report(number, step, value) if value is not None and step > 0 else None
        if reason is not None:
            self.sweep_dir.trial(number).move_to(Status.PRUNED, reason=reason)
        return reason is not None

    def note_error(self, tune_id: str, error: Exception | None) -> None:
        """Keep the error of a trial's process if it is the machine's; `end` is called next."""
        machine = None if error is None else machine_error(error)
        if machine is not None:
            self._machine[tune_id] = machine

    def end(self, tune_id: str, *, died: bool, machine: MachineError | None = None) -> None:
        """Record how a trial ended, from what its directory says.

        Raises StopSweep where the machine failed, not the trial, which stays RUNNING.
        """
        number = self._numbers.pop(tune_id)
        run_dir = self.sweep_dir.trial(number)
        machine = machine or self._machine.pop(tune_id, None)
        if machine is not None:
            self._stop(run_dir, machine)
        in_a_pack = self._servers.remove(number, run_dir)
        if died and in_a_pack and run_dir.status in (Status.CREATED, Status.RUNNING):
            # Another trial of the pack may have been the cause: alone it will show.
            self._note_delay(number)
            trial, recipe = self.study.describe(number), recipes.read(run_dir.recipe)
            self._waiting.append(_Waiting(trial, run_dir, recipe, alone=True))
            self.progress.restarts_alone(number)
            return
        before, self._oom_kills = self._oom_kills, oom_kills()
        if died and self._oom_kills > before and run_dir.status in (Status.CREATED, Status.RUNNING):
            error = MachineError(
                NO_MEMORY,
                got=f"{run_dir.path}: the kernel ended the trial's process",
                fix="free memory, or lower sweep.max_concurrent",
            )
            self._stop(run_dir, error)
        value, step = trials.final_value(run_dir, self.study.plan.sweep.metric)
        if run_dir.status is Status.COMPLETE:
            reason = self.study.complete(number, value, step)
            if reason is not None:
                run_dir.update(reason=reason)
        elif run_dir.status is not Status.PRUNED:
            if run_dir.status is not Status.FAILED:
                reason = self._cause_of_death(run_dir) if died else "it stopped early"
                run_dir.move_to(Status.FAILED, reason=reason)
            self.study.fail(number, run_dir.read_manifest()["reason"])
        self.progress.ended(number, value)
        self._count_failures(number)
        self.record_seconds()

    def _note_delay(self, number: int) -> None:
        """Tell the study how far the running trials are, for this one resumes later than they."""
        running = [r.number for r in self.study.trials() if r.state is TrialState.RUNNING]
        steps = {trial: trials.last_step(self.sweep_dir.trial(trial)) for trial in running}
        left: dict[int, int | None] = {}
        for trial in running:
            total = self._total_steps.get(trial)
            if trial != number:
                left[trial] = None if total is None else total - steps[trial]
        self.study.note_late_restart(number, steps[number], left)

    def _stop(self, run_dir: RunDir, machine: MachineError) -> None:
        """Stop the sweep; but fail a trial alone that runs out of memory a second time."""
        history = run_dir.read_manifest()["status_history"]
        again = any(str(entry.get("reason")).startswith(NO_MEMORY) for entry in history)
        if machine.what == NO_MEMORY and again:
            run_dir.move_to(Status.FAILED, reason=f"{NO_MEMORY} a second time: {machine.got}")
            return
        run_dir.fail(machine)
        raise StopSweep(machine)

    def _cause_of_death(self, run_dir: RunDir) -> str:
        if not hung(run_dir.log):
            return f"{DIED}; see {run_dir.log.name}"
        seconds = self.study.plan.sweep.stall_seconds
        return (
            f"no report for {seconds:g} s (sweep.stall_seconds): it hung and was ended; "
            f"see {run_dir.log.name}"
        )

    def _count_failures(self, number: int) -> None:
        """Stop a sweep in which `sweep.max_failures` trials in a row failed.

        In a row by their numbers: in a pack the trials that fail end first.
        """
        record = self.study.trials()[number]
        if record.state is not TrialState.FAIL:
            return
        self._failed.add(number)
        first = last = number
        while first - 1 in self._failed:
            first -= 1
        while last + 1 in self._failed:
            last += 1
        count = last - first + 1
        if count >= self.study.plan.sweep.max_failures:
            reason = record.user_attrs.get("reason")
            self.study.stopped = (
                f"{count} trials failed in a row (sweep.max_failures); the last: {reason}"
            )
