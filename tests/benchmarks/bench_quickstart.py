"""Seconds of the quickstart's first 8 trials, with the code before packs and with today's.

Both run `python -m harness.sweep` with their own defaults, alternating, on the packages installed
here. Nothing is pruned, so that both train the same trials.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from harness.core.paths import PROJECT
from harness.records.run_dir import RunDir
from tests.benchmarks.bench_sweep import COMPLETIONS, CORES, steps_of, sweep_of
from tests.benchmarks.side_by_side import middle, write_record

# The last commit without packs: each process trains one trial at a time with a base and engine.
BEFORE = "b2c0c5d"
ROUNDS = 3
OVERRIDES = ["sweep.num_trials=8", "sweep.seeds=[0]", "sweep.pruner=null"]


def main() -> None:
    """Measure, print, and write `docs/benchmarks/quickstart.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as scratch:
        code = {"before": checked_out(BEFORE, Path(scratch) / "code"), "now": PROJECT}
        for turn in range(options.rounds):
            for name, tree in code.items():
                rounds[name].append(sweep(tree, Path(scratch) / f"{name}{turn}"))
                print(f"{name:>6}  {rounds[name][-1]}", flush=True)
    write_record(
        "quickstart",
        __doc__,
        rounds=options.rounds,
        before=BEFORE,
        overrides=OVERRIDES,
        runs=rounds,
        medians={name: medians(results) for name, results in rounds.items()},
    )


def medians(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each number's median over the rounds."""
    parts = {
        part: middle((one["parts_s"][part] for one in results), 2) for part in results[0]["parts_s"]
    }
    return {
        key: middle((one[key] for one in results), 2) for key in results[0] if key != "parts_s"
    } | {"parts_s": parts}


def checked_out(commit: str, folder: Path) -> Path:
    """Check a commit out into a folder and return the folder."""
    archive = subprocess.run(
        ["git", "-C", str(PROJECT), "archive", commit], capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def sweep(code: Path, sweep_folder: Path) -> dict[str, Any]:
    """Return the seconds of a sweep with a folder's code, their parts, and the rollouts' speed."""
    sweep_folder.mkdir()
    outcome = sweep_of("recipes/quickstart.yaml", sweep_folder, OVERRIDES, code)
    trials = [RunDir(folder) for folder in RunDir(sweep_folder / "sweep").trials.iterdir()]
    tokens = sum(
        row["completions/mean_length"] * COMPLETIONS for trial in trials for row in steps_of(trial)
    )
    rolling = CORES * outcome["parts_s"]["rollout"]
    return {
        "makespan_s": outcome["makespan_s"],
        "tokens_per_second_and_process": round(tokens / rolling),
        "parts_s": outcome["parts_s"],
    }


if __name__ == "__main__":
    main()
