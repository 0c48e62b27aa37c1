"""The quickstart's first 8 trials, with the code before packs and with today's: seconds of `python -m harness.sweep`.

Both with their own defaults, in turn, on the packages installed here; no pruning, so that both train the same trials.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.paths import PROJECT
from harness.rundir import RunDir
from tests.benchmarks.bench_sweep import COMPLETIONS, read_sweep, steps_of, time_of_parts
from tests.benchmarks.side_by_side import middle, write_record

BEFORE = "b2c0c5d"  # the last commit without packs: trials trained one at a time on the base and engine of a process
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
                rounds[name].append(sweep(tree, Path(scratch) / "runs", f"{name}{turn}"))
                print(f"{name:>6}  {rounds[name][-1]}", flush=True)
    write_record("quickstart", __doc__, rounds=options.rounds, before=BEFORE, overrides=OVERRIDES, seconds=rounds,
                 medians={name: medians(found) for name, found in rounds.items()})  # fmt: skip


def medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Each number's median over the rounds."""
    parts = {part: middle((one["parts_s"][part] for one in found), 2) for part in found[0]["parts_s"]}
    return {key: middle((one[key] for one in found), 2) for key in found[0] if key != "parts_s"} | {"parts_s": parts}


def checked_out(commit: str, folder: Path) -> Path:
    """The project's files as of a commit, in a folder."""
    archive = subprocess.run(["git", "-C", str(PROJECT), "archive", commit], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


def sweep(code: Path, runs: Path, name: str) -> dict[str, Any]:
    """Seconds of the quickstart's sweep with the code of a folder, and where they went."""
    environment = {**os.environ, "PYTHONPATH": str(code)}
    environment.pop("OMP_NUM_THREADS", None)
    runs.mkdir(exist_ok=True)
    log, start = runs / f"{name}.txt", time.time()
    with log.open("wb") as out:
        status = subprocess.run(
            [sys.executable, "-m", "harness.sweep", "recipes/quickstart.yaml", f"trainer.ckpt_path={runs}",
             f"trainer.run_name={name}", *OVERRIDES],
            cwd=code, env=environment, stdout=out, stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip
    if status != 0:
        raise RuntimeError(f"harness.sweep exited with {status}:\n{log.read_text()[-3000:]}")
    makespan, done = round(time.time() - start, 2), RunDir(runs / name)
    trials = [RunDir(folder) for folder in done.trials.iterdir()]
    tokens = sum(row["completions/mean_length"] * COMPLETIONS for trial in trials for row in steps_of(trial))
    return {"makespan_s": makespan, "tokens_per_second_and_process": round(tokens / time_of_parts(trials)["rollout"]),
            "parts_s": read_sweep(done, start, makespan)["parts_s"]}  # fmt: skip


if __name__ == "__main__":
    main()
