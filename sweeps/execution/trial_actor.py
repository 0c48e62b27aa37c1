"""What Ray Tune runs, a class Trainable: a trial that trains in its own process, or one that a hub
trains.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.tune import Trainable

from harness.config import recipe as recipes
from harness.core.errors import MachineError, machine_error
from harness.loggers.loggers import Loggers
from harness.records.run_dir import RunDir
from rltrain.distributed.process import redirect_output
from sweeps.execution.pack_server import EVALUATED, own, record
from sweeps.execution.watchdog import stop_watching, watch

if TYPE_CHECKING:
    from rltrain.report import Report


class TrialActor(Trainable):
    """Follows the run directory in its config; one `step()` goes to the next evaluation."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial; `run_dir`, `metric`, `stall_seconds` and `hub`, the process to
        train in, are given.
        """
        self._reports: Iterator[Report] | None = None
        self._loggers: Loggers | None = None
        self._trial = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self._leave()
        self._trial = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation: step, total_steps, value of the metric if logged, done.

        Where not the trial but the machine failed, `machine` is the error that says so, and the
        trial is done here.
        """
        run_dir = RunDir(self._trial["run_dir"])
        try:
            if self._reports is None:
                redirect_output(run_dir.log)
                self._loggers = Loggers(
                    recipes.read(run_dir.recipe), run_dir, group=run_dir.path.parents[1].name
                )
                hub = self._trial["hub"]
                self._reports = (
                    self._from_hub(ray.get_actor(hub), str(run_dir.path))
                    if hub
                    else self._watched(run_dir)
                )
            for report in self._reports:
                assert self._loggers is not None
                self._loggers.report(report.total_steps, report.metrics)
                if EVALUATED in report.metrics or report.done:
                    return {
                        "step": report.step,
                        "total_steps": report.total_steps,
                        "done": report.done,
                        "value": report.metrics.get(self._trial["metric"]),
                    }
            return {"step": 0, "total_steps": 0, "done": True, "value": None}
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, MachineError):
                raise
            return _ended_by(error.cause)
        except ray.exceptions.RayActorError as error:
            if (machine := machine_error(error)) is not None:
                return _ended_by(machine)
            raise  # the hub's process died, which may have been another's doing
        except Exception as error:
            if (machine := record(run_dir, error)) is not None:
                return _ended_by(machine)
            raise

    def cleanup(self) -> None:
        """Give everything back."""
        self._leave()

    def train_here(self, run_dir: RunDir) -> Iterator[Report]:
        """The reports of a run that is trained in this process, or in workers of its own."""
        from rltrain.distributed.process import quiet_libraries

        quiet_libraries()
        from rltrain.trainer import run

        return run(recipes.read(run_dir.recipe), run_dir)

    def _from_hub(self, hub: Any, path: str) -> Iterator[Report]:
        """The reports of a run that a hub trains; they end early when it fails."""
        done = False
        while not done:
            reports = ray.get(hub.advance.remote(path))
            yield from reports
            done = not reports or reports[-1].done

    def _watched(self, run_dir: RunDir) -> Iterator[Report]:
        """The reports of `train_here`, under a watch except while the trial waits for the sweep."""
        seconds, lock = self._trial["stall_seconds"], own(run_dir)
        try:
            watch(seconds)
            for report in self.train_here(run_dir):
                stop_watching()
                yield report
                watch(seconds)
        finally:
            stop_watching()
            lock.release()

    def _leave(self) -> None:
        """Let go of the trial."""
        if isinstance(self._reports, Generator):
            self._reports.close()
        self._reports = None
        if self._loggers is not None:
            self._loggers.close()
            self._loggers = None


def _ended_by(machine: MachineError) -> dict[str, Any]:
    return {"step": 0, "total_steps": 0, "done": True, "value": None, "machine": machine}
