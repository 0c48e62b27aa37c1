"""Cost of integrity: the quickstart's steps with and without checksums, manifest and fsync.

The check that the engine serves the policy is part of it. Both variants alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from harness.config import recipe as recipes
from harness.records import manifest
from harness.records.run_dir import RunDir
from tests.benchmarks.side_by_side import write_record

REPEATS = 7
STEPS = 8  # the steps of one checkpoint interval


def main() -> None:
    """Measure, print, and write `docs/benchmarks/checks.json`."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    from rltrain.worker_group import train_run

    seconds: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as scratch:
        total = 2 * (REPEATS + 1) * STEPS
        recipe = recipes.load(
            "quickstart",
            [
                f"trainer.max_steps={total}",
                "trainer.eval_before_train=false",
                "trainer.eval_interval=0",
            ],
        )
        recipe.sweep = None
        run_dir = RunDir(Path(scratch) / "run")
        run_dir.create(
            recipes.to_yaml(recipe),
            manifest.build(recipe, kind="run", name="run", source="benchmark"),
        )
        reports = train_run(recipe, run_dir)
        # One warm-up each, then alternating, so that a slow minute of the machine affects both.
        for turn in range(2 * (REPEATS + 1)):
            name = ("with", "without")[turn % 2]
            start = time.perf_counter()
            with unchecked() if name == "without" else contextlib.nullcontext():
                for _ in range(STEPS):
                    next(reports)
            if turn > 1:
                seconds[name].append((time.perf_counter() - start) / STEPS)
            print(f"{name:>8}  {(time.perf_counter() - start) / STEPS:.3f} s a step", flush=True)
    # Neighbouring steps are compared: the lengths of completions change as the policy learns.
    ratio = statistics.median(
        a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)
    )
    print(f"with checks a step takes {100 * (ratio - 1):+.1f}% (median of {REPEATS} pairs)")
    write_record(
        "checks",
        __doc__,
        repeats=REPEATS,
        steps=STEPS,
        threads=1,
        seconds_per_step=seconds,
        ratio=ratio,
    )


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """No sync proof, no manifest, no checksum, no waiting for the disk."""
    from harness.records import files
    from rltrain.algorithms.policy import Policy

    def nothing(*_: Any, **__: Any) -> None:
        return None

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (Policy, "check_engine"),
            (Policy, "check_statistics"),
            (RunDir, "update"),
            (files, "seal"),
            (os, "fsync"),
        ):
            stack.enter_context(mock.patch.object(owner, name, nothing))
        yield


if __name__ == "__main__":
    main()
