"""Where Ray Tune's trials, the study's and their directories meet. Knows nothing of Ray."""

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
from sweeps.execution.placement import Hubs, Places
from sweeps.execution.watchdog import hung, oom_kills
from sweeps.study import trials
from sweeps.study.progress import Progress
from sweeps.study.study import Study, Trial

DIED = "the trial's process died: killed, out of memory, or crashed"

# Trials that were asked for and wait for a place.
MOST_WAITING = 8


class Stop(BaseException):
    """Ends a sweep at once, its running trials left RUNNING. No Exception, which Tune would take
    for a trial's.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A trial that waits for a place; `alone`: one in which no other trains."""

    trial: Trial
    run_dir: RunDir
    recipe: Recipe
    alone: bool = False


class Ledger:
    """What searcher and scheduler share: which Tune trial runs which of the study's, and where
    results are written.
    """

    def __init__(
        self, sweep_dir: RunDir, study: Study, progress: Progress, hubs: Hubs | None = None
    ) -> None:
        """`hubs` are the processes that train packs; without them each trial trains in its own."""
        self.sweep_dir = sweep_dir
        self.study = study
        self.progress = progress
        self._places = Places(study.plan.recipe, hubs)
        self._numbers: dict[str, int] = {}
        self._waiting: list[_Waiting] = []
        self._failed: set[int] = set()
        self._total_steps: dict[int, int] = {}
        self._machine: dict[str, MachineError] = {}
        self._oom_kills = oom_kills()
        self._began = time.monotonic()
        self._record = sweep_dir.read_manifest()
        self._before: float = self._record.get("seconds", 0.0)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher for a restore of its own, and here the journal is the
        state.
        """
        return {}

    def stamp(self) -> None:
        """Write how long the sweep has run, over all its processes."""
        self.sweep_dir.update(seconds=self._before + time.monotonic() - self._began)

    def prepare(self) -> None:
        """Start what the sweep's trials will share."""
        self._places.prepare(self.sweep_dir, self.study.num_left)

    @property
    def over(self) -> bool:
        """Whether no trial runs, and none is to come."""
        return not self._numbers and (self.study.stopped is not None or not self._waiting)

    def begin(self, tune_id: str) -> dict[str, Any] | None:
        """The next trial's config for the actor, its directory made; None when there is none left,
        or no place.
        """
        self._stop_at_changed_inputs()
        found = None if self.study.stopped else self._next()
        if found is None:
            return None
        trial, run_dir, hub = found
        self._numbers[tune_id] = trial.number
        self.progress.began(trial, run_dir)
        sweep = self.study.plan.sweep
        return {
            "run_dir": str(run_dir.path),
            "metric": sweep.metric,
            "stall_seconds": sweep.stall_seconds,
            "hub": hub,
        }

    def _stop_at_changed_inputs(self) -> None:
        """Begin no trial on other data than those before it, nor with another model or environment
        module.
        """
        if self.study.stopped is None and (changes := changed_inputs(self._record)):
            self.study.stopped = f"the sweep's inputs changed: {'; '.join(map(str, changes))}"

    def _next(self) -> tuple[Trial, RunDir, str | None] | None:
        """A trial and where it trains: one that waits for a place, else a new one of the
        study's.
        """
        for waiting in self._waiting:
            if (place := self._admit(waiting)) is not None:
                self._waiting.remove(waiting)
                return place
        # A few may wait, so that those that must be alone do not stop the packs; not so many that
        # the packs run dry.
        while (
            self._places.open
            and len(self._waiting) < MOST_WAITING
            and (trial := self.study.ask()) is not None
        ):
            waiting = self._wait(trial, trials.create(self.study.plan, trial, self.sweep_dir))
            if (place := self._admit(waiting)) is not None:
                return place
            self._waiting.append(waiting)
        return None

    def _admit(self, waiting: _Waiting) -> tuple[Trial, RunDir, str | None] | None:
        number = waiting.trial.number
        if not self._places.admit(number, waiting.recipe, waiting.run_dir, alone=waiting.alone):
            return None
        return waiting.trial, waiting.run_dir, self._places.hub_of(number)

    def _wait(self, trial: Trial, run_dir: RunDir, *, alone: bool = False) -> _Waiting:
        """A trial with its recipe, read once: Tune asks for places many times a second."""
        return _Waiting(trial, run_dir, recipes.read(run_dir.recipe), alone)

    def report(self, tune_id: str, step: int, total_steps: int, value: float | None) -> bool:
        """Record an evaluation; whether the pruner stops the trial."""
        number = self._numbers[tune_id]
        self._total_steps[number] = total_steps
        self.progress.evaluated(number, step, total_steps, value)
        # Step 0 is the base model, the same in every trial: nothing to prune by.
        reason = self.study.report(number, step, value) if value is not None and step > 0 else None
        if reason is not None:
            self.sweep_dir.trial(number).move_to(Status.PRUNED, reason=reason)
        return reason is not None

    def note(self, tune_id: str, error: Exception | None) -> None:
        """Keep what ended a trial's process, where that was the machine; `end` is called next."""
        machine = None if error is None else machine_error(error)
        if machine is not None:
            self._machine[tune_id] = machine

    def end(self, tune_id: str, *, died: bool, machine: MachineError | None = None) -> None:
        """Record how a trial ended, from what its directory says.

        Raises Stop where not the trial but the machine failed: it stays RUNNING, for the next
        resume.
        """
        number = self._numbers.pop(tune_id)
        run_dir = self.sweep_dir.trial(number)
        machine = machine or self._machine.pop(tune_id, None)
        if machine is not None:
            self._stop(run_dir, machine)
        in_a_pack = self._places.leave(number, run_dir)
        if died and in_a_pack and run_dir.status in (Status.CREATED, Status.RUNNING):
            # A companion may have brought its process down: alone it shows whether it was its own
            # doing.
            self._fall_behind(number)
            self._waiting.append(self._wait(self.study.describe(number), run_dir, alone=True))
            self.progress.displaced(number)
            return
        before, self._oom_kills = self._oom_kills, oom_kills()
        if died and self._oom_kills > before and run_dir.status in (Status.CREATED, Status.RUNNING):
            self._stop(
                run_dir,
                MachineError(
                    NO_MEMORY,
                    got=f"{run_dir.path}: the kernel ended the trial's process",
                    fix="free memory, or lower sweep.max_concurrent",
                ),
            )
        value, step = trials.final_value(run_dir, self.study.plan.sweep.metric)
        if run_dir.status is Status.COMPLETE:
            reason = self.study.complete(number, value, step)
            if reason is not None:
                run_dir.update(reason=reason)
        elif run_dir.status is not Status.PRUNED:
            if run_dir.status is not Status.FAILED:
                run_dir.move_to(
                    Status.FAILED, reason=self._why(run_dir) if died else "it stopped early"
                )
            self.study.fail(number, run_dir.read_manifest()["reason"])
        self.progress.ended(number, value)
        self._count_failures(number)
        self.stamp()

    def _fall_behind(self, number: int) -> None:
        """Note how far the running trials are, for the pruner: this one goes on when others may
        have ended.
        """
        running = [
            record.number for record in self.study.trials() if record.state is TrialState.RUNNING
        ]
        steps = {one: trials.last_step(self.sweep_dir.trial(one)) for one in running}
        totals = {one: self._total_steps.get(one) for one in running if one != number}
        left = {one: None if total is None else total - steps[one] for one, total in totals.items()}
        self.study.fall_behind(number, steps[number], left)

    def _stop(self, run_dir: RunDir, machine: MachineError) -> None:
        """Stop the sweep, but for a trial that needs more memory than there is: alone again, it
        fails by itself.
        """
        said = [str(entry.get("reason")) for entry in run_dir.read_manifest()["status_history"]]
        if machine.what == NO_MEMORY and any(reason.startswith(NO_MEMORY) for reason in said):
            run_dir.move_to(Status.FAILED, reason=f"{NO_MEMORY} a second time: {machine.got}")
            return
        run_dir.fail(machine)
        raise Stop(machine)

    def _why(self, run_dir: RunDir) -> str:
        """What ended a trial's process without a word from the trainer."""
        if hung(run_dir.log):
            seconds = self.study.plan.sweep.stall_seconds
            return (
                f"no report for {seconds:g} s (sweep.stall_seconds): it hung and was "
                f"ended; see {run_dir.log.name}"
            )
        return f"{DIED}; see {run_dir.log.name}"

    def _count_failures(self, number: int) -> None:
        """A machine or recipe that fails every trial must not burn them all.

        In a row is in the order they began: of trials that train together those that fail end
        first.
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
        if last - first + 1 >= self.study.plan.sweep.max_failures:
            in_a_row = f"{last - first + 1} trials failed in a row (sweep.max_failures)"
            self.study.stopped = f"{in_a_row}; the last: {record.user_attrs.get('reason')}"
