"""The Trainable that Ray Tune runs: it follows a trial that a pack server trains."""

from __future__ import annotations

from typing import Any

import ray
from ray.tune import Trainable

from harness.core.errors import MachineError, machine_error
from harness.loggers.loggers import Loggers
from harness.records.run_dir import RunDir
from rltrain.distributed.process import redirect_output
from sweeps.execution.pack_server import record_error


class TrialActor(Trainable):
    """Follows the trial in its config: `run_dir`, `recipe`, `metric` and the server's name."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
        self._trial = config
        self._loggers: Loggers | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self.cleanup()
        self._trial = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation.

        Returns:
            `step`, `total_steps`, `value` of the metric, if it was logged, and `done`. Where the
            machine failed, not the trial, `machine` is the error, and the trial is done here.
        """
        run_dir = RunDir(self._trial["run_dir"])
        try:
            if self._loggers is None:
                redirect_output(run_dir.log)
                sweep = run_dir.path.parents[1].name
                self._loggers = Loggers(self._trial["recipe"], run_dir, group=sweep)
            server = ray.get_actor(self._trial["server"])
            call = server.advance.remote(str(run_dir.path), self._trial["recipe"])
            reports = ray.get(call)
            for report in reports:
                self._loggers.report(report.total_steps, report.metrics)
            if not reports:
                return {"step": 0, "total_steps": 0, "done": True, "value": None}
            last = reports[-1]
            return {
                "step": last.step,
                "total_steps": last.total_steps,
                "done": last.done,
                "value": last.metrics.get(self._trial["metric"]),
            }
        except Exception as error:
            machine: MachineError | None
            if isinstance(error, ray.exceptions.RayTaskError):
                machine = error.cause if isinstance(error.cause, MachineError) else None
            elif isinstance(error, ray.exceptions.RayActorError):
                machine = machine_error(error)  # None: the server died, maybe of another trial
            else:
                machine = record_error(run_dir, error)
            if machine is None:
                raise
            return {"step": 0, "total_steps": 0, "done": True, "value": None, "machine": machine}

    def cleanup(self) -> None:
        """Leave the trial."""
        if self._loggers is not None:
            self._loggers.close()
            self._loggers = None
