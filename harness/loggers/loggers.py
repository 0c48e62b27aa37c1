"""All loggers of a run behind one object.

`metrics.jsonl` is the complete record of a run. After a kill, W&B and TensorBoard may lack its last
rows. When the run is resumed they get all earlier rows again: none is missing, some may be there
twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from harness.config.metrics import ACCURACY
from harness.config.schema import Logger, Recipe
from harness.loggers.base import RunLogger
from harness.loggers.console import Console
from harness.loggers.tensorboard import TensorBoard
from harness.loggers.wandb import WandB, wandb_mode
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status


class Loggers:
    """The loggers that a recipe's `trainer.logger` names, for one run.

    `group` is the name of the run's sweep. Raises UserError when W&B cannot start. Close it
    whatever happens, e.g. with `contextlib.closing`.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, *, group: str | None = None) -> None:
        self._run_dir = run_dir
        self._replayed = False
        self._loggers: list[RunLogger] = []
        names = recipe.trainer.logger
        if Logger.console in names:
            self._loggers.append(Console())
        if Logger.tensorboard in names:
            self._loggers.append(TensorBoard(run_dir))
        if Logger.wandb in names and (mode := wandb_mode()) != "disabled":
            self._loggers.append(WandB(recipe, run_dir, group=group, mode=mode))

    def report(self, total_steps: int, row: Mapping[str, float]) -> None:
        """Log a row and its evaluation's samples; after the last step of a complete run, its
        result.
        """
        if not self._replayed:
            self._replayed = True
            self._replay(total_steps, int(row["step"]))
        samples = self._samples(row)
        for logger in self._loggers:
            logger.log(row, samples, total_steps)
        if row["step"] >= total_steps and self._run_dir.status is Status.COMPLETE:
            adapter = self._run_dir.adapter / "final"
            has_adapter = (adapter / "adapter_config.json").is_file()
            result = self._run_dir.read_manifest()["result"]
            for logger in self._loggers:
                logger.finish(result, adapter if has_adapter else None)

    def close(self) -> None:
        """Close every logger, even when closing another fails."""
        with contextlib.ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)
        self._loggers = []

    def _replay(self, total_steps: int, step: int) -> None:
        """Log the rows before a step again, to the loggers that want them."""
        starts = [(logger, logger.replay_from) for logger in self._loggers]
        replaying = [(logger, start) for logger, start in starts if start is not None]
        rows = MetricsFile(self._run_dir.metrics).rows() if replaying else []
        for row in (row for row in rows if row["step"] < step):
            samples = self._samples(row)
            for logger, start in replaying:
                if row["step"] >= start:
                    logger.log(row, samples, total_steps)

    def _samples(self, row: Mapping[str, float]) -> list[dict[str, Any]]:
        """Return the completions kept from a row's evaluation; [] where there are none."""
        path = self._run_dir.eval_samples(int(row["step"]))
        if ACCURACY not in row or not path.is_file():
            return []
        import pyarrow.parquet

        samples: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return samples
