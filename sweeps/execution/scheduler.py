"""Ray Tune's searcher and scheduler over a sweep's study, without state of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sweeps.execution.controller import StopSweep, TrialController


class StudySearcher(Searcher):
    """Asks the study for trials, and tells it how they ended."""

    def __init__(self, controller: TrialController) -> None:
        super().__init__()
        self._controller = controller

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's config; None while none has a slot, FINISHED at the end."""
        with _stop_on_error():
            config = self._controller.begin(trial_id)
            return Searcher.FINISHED if config is None and self._controller.over else config

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record the end of a trial."""
        with _stop_on_error():
            machine = (result or {}).get("machine")
            self._controller.end(trial_id, died=error, machine=machine)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study's journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: a resumed sweep is a new one over the same journal."""


class PrunerScheduler(FIFOScheduler):
    """Stops a trial when the study's pruner says so; the study then has it as PRUNED."""

    def __init__(self, controller: TrialController) -> None:
        super().__init__()
        self._controller = controller

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Continue or stop after an evaluation."""
        with _stop_on_error():
            pruned = self._controller.report(
                trial.trial_id, result["step"], result["total_steps"], result["value"]
            )
        return TrialScheduler.STOP if pruned else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Note what ended a trial's process, before the searcher is told that it died."""
        self._controller.note_error(trial.trial_id, trial.get_pickled_error())


@contextlib.contextmanager
def _stop_on_error() -> Iterator[None]:
    """End the sweep on an error here (an unwritable journal), which Tune would give to a trial."""
    try:
        yield
    except Exception as error:
        raise StopSweep(error) from error
