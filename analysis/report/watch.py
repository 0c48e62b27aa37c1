"""A live page: the report written again whenever a run or sweep that is under way has something
new.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from harness.core.errors import UserError
from harness.records.run_dir import RunDir, Status

Written = TypeVar("Written")
# Drawing takes seconds of a core that the sweep could use: after it comes a rest so many times as
# long.
REST = 4


def watch_report(
    write: Callable[[int | None], Written],
    directories: Sequence[Path],
    *,
    every: int = 5,
    begun: Callable[[Written], None] | None = None,
) -> Written:
    """Call `write(every)` at each change until all directories' runs have ended or Ctrl-C, then
    `write(None)`, the page that stays; returns what that gives. `begun` is told of the first.
    Raises UserError when `every`, in seconds, is not positive.
    """
    if every < 1:
        raise UserError(
            "the page is written again every so many seconds", got=every, allowed="1 or more"
        )
    seen = None
    try:
        while not all(map(_ended, directories)):
            found = [_state(directory) for directory in directories]
            start = time.monotonic()
            if found != seen:
                written = write(every)
                if seen is None and begun is not None:
                    begun(written)
            seen = found
            time.sleep(max(every, REST * (time.monotonic() - start)))
    except KeyboardInterrupt:
        pass  # who watches has seen enough; the sweep goes on
    return write(None)


def _ended(directory: Path) -> bool:
    return RunDir(directory).status not in (Status.CREATED, Status.RUNNING)


def _state(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every record that a page is made from; a file that goes meanwhile is not
    there.
    """
    run, found = RunDir(directory), {}
    for folder in (run.path, *sorted(run.trials.glob("*"))):
        for file in (folder / "manifest.json", folder / "metrics.jsonl"):
            try:
                about = file.stat()
            except OSError:
                continue
            found[str(file)] = (about.st_size, about.st_mtime_ns)
    return found
