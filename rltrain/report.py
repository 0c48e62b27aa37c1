"""Progress report of a run. Apart from the trainer: importing it does not load torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepReport:
    """A run's progress after a step, with its row of `metrics.jsonl`."""

    step: int
    total_steps: int
    metrics: dict[str, float]

    @property
    def done(self) -> bool:
        """Whether this was the last step."""
        return self.step >= self.total_steps
