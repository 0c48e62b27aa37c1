"""Wall time of a step's parts."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class Timer:
    """Wall time of named spans, summed until taken."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time inside under `timing_s/<name>`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[f"timing_s/{name}"] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by metric name since the last call."""
        spent, self._spent = dict(self._spent), defaultdict(float)
        return spent
