"""The interface of a logger."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class RunLogger(ABC):
    """One destination for the metrics and samples of one run."""

    replay_from: int | None = 0
    """The first step of the earlier rows that a resumed run logs again; None: it logs none."""

    @abstractmethod
    def log(
        self, row: Mapping[str, float], samples: Sequence[Mapping[str, Any]], total_steps: int
    ) -> None:
        """Log a row of metrics, with its `step`, and the scored completions of its evaluation."""

    def finish(self, result: dict[str, Any], adapter: Path | None) -> None:
        """Log the result of a complete run, and the folder of its adapter if it has one."""
        return

    def close(self) -> None:
        """Write what is buffered and close files; the run may be resumed later."""
        return
