"""Reports of sweeps of 1 to 500 trials: seconds to write, page size, load time in Chromium."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from harness.records.run_dir import Status
from tests.benchmarks.side_by_side import write_record
from tests.integration.browser import CHROMIUM, Browser
from tests.unit.analysis.synthetic import BASE, Sweep, Trial, params, write_report, write_sweep

TRIALS = (1, 18, 200, 500)
SEEDS = (0, 1)
WRITES, LOADS = 3, 7
# Milliseconds from the start of navigation. The first screen is complete at the second, pictures at
# the third.
MARKS = {"parsed": "domInteractive", "usable": "domContentLoadedEventEnd", "loaded": "loadEventEnd"}


def main() -> None:
    """Write, load, print, and write `docs/benchmarks/report.json`."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    if CHROMIUM is None:
        print("left out: chromium is not on PATH (apt-get install chromium)")
        return
    with tempfile.TemporaryDirectory() as scratch:
        sweeps = {count: write_sweep(Path(scratch) / str(count), sweep(count)) for count in TRIALS}
        seconds: dict[int, list[float]] = {count: [] for count in TRIALS}
        for _ in range(WRITES):
            for count, directory in sweeps.items():
                start = time.perf_counter()
                write_report(directory, processes=os.cpu_count() or 1)
                seconds[count].append(time.perf_counter() - start)
        with Browser(Path(scratch) / "profile") as browser:
            loads = loaded(
                browser, {count: path / "report" / "index.html" for count, path in sweeps.items()}
            )
        rows: dict[str, dict[str, Any]] = {}
        for count, path in sweeps.items():
            page = path / "report" / "index.html"
            rows[str(count)] = {
                "page_mb": round(page.stat().st_size / 2**20, 3),
                "write_s": round(median(seconds[count]), 3),
                **{
                    f"{name}_ms": round(median(load_times), 1)
                    for name, load_times in loads[count].items()
                },
            }
            print(f"{count:4} trials: {rows[str(count)]}", flush=True)
    write_record("report", __doc__, writes=WRITES, loads=LOADS, sizes=rows)


def loaded(browser: Browser, pages: dict[int, Path]) -> dict[int, dict[str, list[float]]]:
    """Return load times of pages, which alternate, each in a new tab."""
    times: dict[int, dict[str, list[float]]] = {
        count: {name: [] for name in MARKS} for count in pages
    }
    for _ in range(LOADS):
        for count, path in pages.items():
            with browser.page(path.as_uri()) as page:
                page.wait("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
                marks = page.run("performance.getEntriesByType('navigation')[0].toJSON()")
            for name, mark in MARKS.items():
                times[count][name].append(float(marks[mark]))
    return times


def sweep(count: int) -> Sweep:
    """Return a sweep over rank, alpha, learning rate and target modules.

    Some of its `count` trials are pruned or failed.
    """
    rng = np.random.default_rng(0)
    return Sweep(list(trials(count, rng)), seeds=SEEDS if count > 1 else SEEDS[:1])


def trials(count: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Yield trials whose best learning rates are the same at every rank."""
    rates = np.geomspace(1e-5, 1e-2, 13).tolist()
    grid = [
        params(*one) for one in product((1, 4, 16, 64), rates, (16, 32, 64), ("all-linear", "mlp"))
    ]
    order = rng.permutation(len(grid))
    for number in range(count):
        configuration, seed = divmod(number, len(SEEDS)) if count > 1 else (0, 0)
        values = grid[order[configuration]]
        off = np.log10(values["trainer.policy.optimizer_config.lr"] / 1e-3)
        score = BASE + 0.62 * float(np.exp(-2 * off**2)) + float(rng.normal(0, 0.016))
        chance = rng.random()
        if chance < 0.1:
            yield Trial(
                configuration,
                seed,
                values,
                score,
                Status.PRUNED,
                "step 10: below the median",
                last_step=10,
            )
        elif chance < 0.13:
            yield Trial(
                configuration,
                seed,
                values,
                score,
                Status.FAILED,
                "out of memory at step 20",
                last_step=20,
            )
        else:
            yield Trial(configuration, seed, values, min(score, 1.0))


if __name__ == "__main__":
    main()
