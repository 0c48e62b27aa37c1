"""What a run tells of its way; apart from the trainer, for those who only listen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Report:
    """Where a run stands after a step: its row of `metrics.jsonl`."""

    step: int
    total_steps: int
    metrics: dict[str, float]

    @property
    def done(self) -> bool:
        """Whether this was the last step."""
        return self.step >= self.total_steps
