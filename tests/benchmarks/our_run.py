"""One run of ours as a contender: `python -m harness.run`, with timestamps of its reports."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

from harness import run
from harness.loggers.loggers import Loggers
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from tests.benchmarks.side_by_side import peak_memory_gb, worker_files


def main() -> None:
    """Train the spec's recipe with its overrides and write the result.

    It has what `trl_run` writes, and the parts of the time.
    """
    spec, result = worker_files()
    stamps = stamp_reports()
    output = Path(spec["output"])
    overrides = [
        *spec["overrides"],
        f"trainer.ckpt_path={output}",
        "trainer.run_name=run",
        f"trainer.num_threads={spec['threads']}",
    ]
    status = run.main([spec["recipe"], *overrides])
    if status != 0:
        raise SystemExit(status)
    run_dir = RunDir(output / "run")
    rows = [row for row in MetricsFile(run_dir.metrics).rows() if "step_time" in row]
    began = stamps[0] - rows[0]["step_time"]  # the first report comes after the first step
    content: dict[str, Any] = {
        "startup_s": round(began - spec["launched"], 3),
        "step_s": [round(end - begin, 4) for begin, end in itertools.pairwise([began, *stamps])],
        "mean_length": [row["completions/mean_length"] for row in rows],
        "reward": [row["reward"] for row in rows],
        "timing_s": {name: [row.get(name, 0.0) for row in rows] for name in timings(rows)},
        "mfu": [row["perf/mfu"] for row in rows],
        "memory_gb": round(peak_memory_gb(), 3),
        "kept": checkpoints(run_dir),
    }
    result.write_text(json.dumps(content))


def stamp_reports() -> list[float]:
    """Return a list to which the time of each report is added, after all loggers are done."""
    stamps: list[float] = []
    report = Loggers.report

    def stamped(self: Loggers, *args: Any, **kwargs: Any) -> None:
        stamps.append(time.time())
        report(self, *args, **kwargs)

    Loggers.report = stamped  # type: ignore[method-assign]
    return stamps


def timings(rows: list[dict[str, float]]) -> list[str]:
    """Return the names of the timed parts of a step."""
    return sorted({name for row in rows for name in row if name.startswith("timing_s/")})


def checkpoints(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return every kept checkpoint: an adapter's weights, and the folder of their configuration."""
    return [
        {
            "step": int(folder.name.removeprefix("step_")),
            "weights": str(folder / "weights.safetensors"),
            "folder": str(run_dir.adapter / "final"),
        }
        for folder in sorted(run_dir.checkpoints.glob("step_*"))
    ]


if __name__ == "__main__":
    main()
