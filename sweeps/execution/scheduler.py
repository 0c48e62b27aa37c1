"""Ray Tune's searcher and scheduler over a sweep's study: thin, without state of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sweeps.execution.controller import Ledger, Stop


class StudySearcher(Searcher):
    """Asks the study for trials, and tells it how they ended."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's config; None while there is no place for one, FINISHED when none is left
        or running.
        """
        with _past_tune():
            config = self._ledger.begin(trial_id)
            return Searcher.FINISHED if config is None and self._ledger.over else config

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record the end of a trial."""
        with _past_tune():
            self._ledger.end(trial_id, died=error, machine=(result or {}).get("machine"))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study's journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep is a new one over the same journal."""


class PrunerScheduler(FIFOScheduler):
    """Stops a trial when the study's pruner says so, so that it is PRUNED in the study and never
    COMPLETE.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Go on or stop after an evaluation."""
        with _past_tune():
            pruned = self._ledger.report(
                trial.trial_id, result["step"], result["total_steps"], result["value"]
            )
        return TrialScheduler.STOP if pruned else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Hear what ended a trial's process, before the searcher is told that it died."""
        self._ledger.note(trial.trial_id, trial.get_pickled_error())


@contextlib.contextmanager
def _past_tune() -> Iterator[None]:
    """End the sweep with an error of its own (a journal that cannot be written): Tune would take it
    for a trial's.
    """
    try:
        yield
    except Exception as error:
        raise Stop(error) from error
