"""A sweep's progress: a live table on a terminal, a line per event elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.config.metrics import duration
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from sweeps.study.sizing import num_slots
from sweeps.study.space import short_names, show
from sweeps.study.study import Study, Trial

# The reason of a pruned trial begins with "pruned".
STATES = {"COMPLETE": "complete: ", "PRUNED": "", "FAIL": "failed: "}


@dataclass
class Running:
    """A trial that is being trained."""

    trial: Trial
    run_dir: RunDir
    began: float
    step: int = 0
    total_steps: int | None = None
    value: float | None = None


class Progress:
    """Shows a sweep while it runs. Use as a context manager: the live table is up inside."""

    def __init__(self, study: Study, console: Console | None = None) -> None:
        self.study = study
        self.console = console or Console(soft_wrap=True)
        self._metric = study.plan.sweep.metric
        self._names = short_names([axis.key for axis in study.plan.space.axes])
        self._running: dict[int, Running] = {}
        self._durations: list[float] = []
        self._began = time.monotonic()
        self._summarize()
        live = Live(
            get_renderable=self.render, console=self.console, refresh_per_second=1, transient=True
        )
        self._live = live if self.console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def began(self, trial: Trial, run_dir: RunDir) -> None:
        """Report that a trial begins."""
        self._running[trial.number] = Running(trial, run_dir, time.monotonic())
        self._summarize()
        confirms = f", confirms configuration {trial.configuration}" if trial.confirm else ""
        self._print(f"trial {trial.number} begins: {self._label(trial)}{confirms}")

    def evaluated(self, number: int, step: int, total_steps: int, value: float | None) -> None:
        """Report an evaluation of a trial."""
        running = self._running[number]
        running.step, running.total_steps = step, total_steps
        running.value = value if value is not None else running.value
        if not self._live and 0 < step < total_steps:
            score = "" if value is None else f": {self._metric} {value:.4g}"
            self._print(f"trial {number} at step {step} of {total_steps}{score}  {self._times()}")

    def restarts_alone(self, number: int) -> None:
        """Report that a pack's process died and one of its trials continues alone."""
        self._running.pop(number)
        self._print(
            f"trial {number}: its pack's process died; it resumes from its checkpoint, alone"
        )

    def ended(self, number: int, value: float | None) -> None:
        """Report that a trial is complete, pruned or failed."""
        running = self._running.pop(number)
        seconds = time.monotonic() - running.began
        self._durations.append(seconds)
        record = self.study.trials()[number]
        score = "" if value is None else f"{self._metric} {value:.4g} in {duration(seconds)}"
        outcome = record.user_attrs.get("reason") or score
        self._summarize()
        self._print(f"trial {number} {STATES[record.state.name]}{outcome}")
        if not self._live:
            self._print(f"  {self._summary}  {self._times()}  {self._best}")

    def render(self) -> Group:
        """Return the table of running trials, with the counts, the time left and the best below."""
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("trial", *self._names.values(), "seed", "step", self._metric, "time"):
            table.add_column(heading, no_wrap=True)
        for running in list(self._running.values()):
            rows = MetricsFile(running.run_dir.metrics).rows()
            if rows:
                running.step = int(rows[-1]["step"])
            values = [row[self._metric] for row in rows if self._metric in row]
            if values:
                running.value = values[-1]
            total = f"/{running.total_steps}" if running.total_steps else ""
            table.add_row(
                str(running.trial.number),
                *(show(running.trial.params[key]) for key in self._names),
                str(running.trial.seed),
                f"{running.step}{total}",
                "" if running.value is None else f"{running.value:.4f}",
                duration(time.monotonic() - running.began),
            )
        # Two lines: rich cuts a line that is longer than the terminal.
        return Group(table, Text(f"{self._summary}  {self._times()}"), Text(self._best))

    def seconds_left(self) -> float | None:
        """Return the time until the sweep's end, None while it cannot be estimated.

        The estimate follows the trials that have ended; before the first one, the steps of those
        that run.
        """
        # A copy: the live table calls this from a thread of its own.
        now, running = time.monotonic(), list(self._running.values())
        durations = self._durations or [
            (now - trial.began) * trial.total_steps / trial.step
            for trial in running
            if trial.step and trial.total_steps
        ]
        if not durations:
            return None
        mean = sum(durations) / len(durations)
        done = sum(min(mean, now - trial.began) for trial in running)
        slots = num_slots(self.study.plan.recipe)
        return max(0.0, self._left * mean - done) / min(slots, max(1, self._left))

    def _summarize(self) -> None:
        """Read the counts and the best from the study: once an event, not once a frame."""
        counts, self._left = self.study.counts(), self.study.num_left
        self._summary = (
            f"{counts['COMPLETE']} complete, {counts['PRUNED']} pruned, {counts['FAIL']} failed, "
            f"{self._left} left of {self.study.num_runs}"
        )
        self._best = ""
        if (best := self.study.best) is not None:
            trial, value = best
            self._best = f"best so far {value:.4f} (trial {trial.number}: {self._label(trial)})"

    def _times(self) -> str:
        left = self.seconds_left()
        eta = f", ETA {duration(left)}" if left else ""
        return f"[{duration(time.monotonic() - self._began)}{eta}]"

    def _label(self, trial: Trial) -> str:
        """Return a trial's configuration and seed on one line: `rank=8 lr=0.001 seed=0`."""
        values = [f"{self._names[key]}={show(value)}" for key, value in trial.params.items()]
        return " ".join([*values, f"seed={trial.seed}"])

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)
