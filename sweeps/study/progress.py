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
from sweeps.study.space import Params, short_names, show
from sweeps.study.study import Study, Trial
from sweeps.study.trials import trials_at_once

# A pruned trial's reason says so itself.
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
        plan = study.plan
        self._names = short_names([axis.key for axis in plan.space.axes])
        self._running: dict[int, Running] = {}
        self._spent: list[float] = []
        self._began = time.monotonic()
        self._count()
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
        """A trial was given to a worker."""
        self._running[trial.number] = Running(trial, run_dir, time.monotonic())
        self._count()
        confirms = f", confirms configuration {trial.configuration}" if trial.confirm else ""
        self._say(f"trial {trial.number} begins: {self._label(trial)}{confirms}")

    def evaluated(self, number: int, step: int, total_steps: int, value: float | None) -> None:
        """A trial came by an evaluation."""
        running = self._running[number]
        running.step, running.total_steps = step, total_steps
        running.value = value if value is not None else running.value
        if not self._live and 0 < step < total_steps:
            reached = "" if value is None else f": {self._score(value)}"
            self._say(f"trial {number} at step {step} of {total_steps}{reached}  {self._times()}")

    def displaced(self, number: int) -> None:
        """A trial's process died in a pack; it goes on alone."""
        self._running.pop(number)
        self._say(f"trial {number}: its pack's process died; it goes on from its checkpoint, alone")

    def ended(self, number: int, value: float | None) -> None:
        """A trial is complete, pruned or failed."""
        running = self._running.pop(number)
        seconds = time.monotonic() - running.began
        self._spent.append(seconds)
        record = self.study.trials()[number]
        reached = "" if value is None else f"{self._score(value)} in {duration(seconds)}"
        self._count()
        self._say(
            f"trial {number} "
            f"{STATES[record.state.name]}{record.user_attrs.get('reason') or reached}"
        )
        if not self._live:
            self.console.print(
                f"  {self._summary}  {self._times()}  {self._best}", highlight=False, markup=False
            )

    def render(self) -> Group:
        """The table of running trials, with the counts, the best so far and the time left
        under it.
        """
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in (
            "trial",
            *self._names.values(),
            "seed",
            "step",
            self.study.plan.sweep.metric,
            "time",
        ):
            table.add_column(heading, no_wrap=True)
        for running in list(self._running.values()):
            self._refresh(running)
            total = f"/{running.total_steps}" if running.total_steps else ""
            value = "" if running.value is None else f"{running.value:.4f}"
            cells = [show(running.trial.params[key]) for key in self._names]
            spent = duration(time.monotonic() - running.began)
            table.add_row(
                str(running.trial.number),
                *cells,
                str(running.trial.seed),
                f"{running.step}{total}",
                value,
                spent,
            )
        # On lines of their own: a line longer than the terminal is cut.
        return Group(table, Text(f"{self._summary}  {self._times()}"), Text(self._best))

    def seconds_left(self) -> float | None:
        """Time until the sweep's end: by the trials ended, before these by the steps of those that
        run, else None.
        """
        # Copied: the live table asks from a thread of its own.
        now, under_way = time.monotonic(), list(self._running.values())
        whole = self._spent or [
            (now - one.began) * one.total_steps / one.step
            for one in under_way
            if one.step and one.total_steps
        ]
        if not whole:
            return None
        mean = sum(whole) / len(whole)
        done = sum(min(mean, now - one.began) for one in under_way)
        at_once = trials_at_once(self.study.plan.recipe)
        return max(0.0, self._left * mean - done) / min(at_once, max(1, self._left))

    def _refresh(self, running: Running) -> None:
        """The step that the trial's own metrics file has come to."""
        rows = MetricsFile(running.run_dir.metrics).rows()
        if rows:
            running.step = int(rows[-1]["step"])
        values = [
            row[self.study.plan.sweep.metric] for row in rows if self.study.plan.sweep.metric in row
        ]
        if values:
            running.value = values[-1]

    def _count(self) -> None:
        """Take the counts and the best from the study: once an event, not once a frame."""
        counts, self._left = self.study.counts(), self.study.num_left
        self._summary = (
            f"{counts['COMPLETE']} complete, {counts['PRUNED']} pruned, {counts['FAIL']} failed, "
            f"{self._left} left of {self.study.num_runs}"
        )
        self._best = ""
        best = self.study.best
        if best is not None:
            self._best = (
                f"best so far {best[1]:.4f} (trial {best[0].number}: {self._label(best[0])})"
            )

    def _times(self) -> str:
        left = self.seconds_left()
        eta = f", ETA {duration(left)}" if left else ""
        return f"[{duration(time.monotonic() - self._began)}{eta}]"

    def _score(self, value: float) -> str:
        return f"{self.study.plan.sweep.metric} {value:.4g}"

    def _label(self, trial: Trial) -> str:
        return label(trial.params, trial.seed, self._names)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)


def label(params: Params, seed: int | None, names: dict[str, str]) -> str:
    """A configuration on one line: `rank=8 lr=0.001 seed=0`."""
    parts = [f"{names[key]}={show(value)}" for key, value in params.items()]
    return " ".join(parts + ([] if seed is None else [f"seed={seed}"]))
