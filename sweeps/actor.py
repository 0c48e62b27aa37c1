"""The process that runs trials, one after another on the same base model and engine: a Ray Tune class Trainable."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from ray.tune import Trainable

from harness import recipe as recipes
from harness.rundir import RunDir, Status
from harness.sinks import Sinks
from rltrain.parallel import needs_workers
from rltrain.quiet import redirect_output
from sweeps.locks import KernelLock
from sweeps.watch import stop_watching, watch

if TYPE_CHECKING:
    from rltrain.member import Member
    from rltrain.pack import Pack
    from rltrain.trainer import Report

# A killed sweep's worker may live on for some seconds: how long its successor waits for it to let go of the directory.
TAKEOVER_SECONDS = 60.0
EVALUATED = "eval/accuracy"


class TrialActor(Trainable):
    """Trains the run directory in its config; one `step()` goes to the next evaluation.

    Nothing heavy happens before the first `step()`: an error there is one of the trial, with a reason.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial; `run_dir`, `metric` and `stall_seconds` are given."""
        self._pack: Pack | None = None
        self._member: Member | None = None
        self._reports: Iterator[Report] | None = None
        self._lock: KernelLock | None = None
        self._sinks: Sinks | None = None
        self._trial = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; base model and engine stay loaded."""
        self._leave()
        self._trial = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation: step, total_steps, value of the metric if logged, done."""
        run_dir = RunDir(self._trial["run_dir"])
        try:
            watch(self._trial["stall_seconds"])
            if self._reports is None:
                self._own(run_dir)
                self._sinks = Sinks(recipes.read(run_dir.recipe), run_dir, group=run_dir.path.parents[1].name)
                self._reports = self.start(run_dir)
            for report in self._reports:
                watch(self._trial["stall_seconds"])
                assert self._sinks is not None
                self._sinks.report(report.total_steps, report.metrics)
                if EVALUATED in report.metrics or report.done:
                    return {"step": report.step, "total_steps": report.total_steps, "done": report.done,
                            "value": report.metrics.get(self._trial["metric"])}  # fmt: skip
            raise RuntimeError("training ended before its last step")
        except Exception as error:
            _record(run_dir, error)
            raise
        finally:
            stop_watching()

    def cleanup(self) -> None:
        """Give everything back."""
        self._leave()
        if self._pack is not None:
            self._pack.close()
            self._pack = None

    def start(self, run_dir: RunDir) -> Iterator[Report]:
        """Join a run to the pack, which is opened anew when it cannot hold the run; the training's reports."""
        from rltrain.quiet import quiet_libraries

        quiet_libraries()
        from rltrain.pack import Pack
        from rltrain.trainer import run, train

        recipe = recipes.read(run_dir.recipe)
        if needs_workers(recipe):
            return run(recipe, run_dir)
        if self._pack is not None and not self._pack.can_hold(recipe):
            self._pack.close()
            self._pack = None
            gc.collect()
        self._pack = self._pack or Pack.open(recipe)
        self._member = self._pack.join(recipe, run_dir)
        return train(self._pack, self._member)

    def _own(self, run_dir: RunDir) -> None:
        """Be the only process that writes a run directory, and write this process's output there."""
        self._lock = KernelLock(run_dir.path / ".lock")
        if not self._lock.acquire(TAKEOVER_SECONDS):
            self._lock = None
            raise RuntimeError(f"another process still writes {run_dir.path}")
        redirect_output(run_dir.log)

    def _leave(self) -> None:
        """Let go of the trial: a training stopped early leaves its pack."""
        if isinstance(self._reports, Generator):
            self._reports.close()
        self._reports = None
        if self._sinks is not None:
            self._sinks.close()
            self._sinks = None
        if self._pack is not None and self._member is not None:
            self._pack.leave(self._member)
            self._member = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _record(run_dir: RunDir, error: Exception) -> None:
    """Write an error's traceback to the log, and its reason to the manifest unless the trainer did."""
    with run_dir.log.open("a") as log:
        log.write("".join(traceback.format_exception(error)))
    if run_dir.status not in (Status.FAILED, Status.COMPLETE):
        run_dir.fail(error)
