"""Run commands in forks of one warm process.

Importing torch takes seconds, a fork takes almost no time. `python -m tests.faults.forks` is the
warm process. It reads requests and answers them, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from harness.core.paths import PROJECT
from tests.faults import hooks
from tests.faults.hooks import Fault

LONGEST = 240.0
# Set in the environment of all processes below the warm process.
MARK = "NOREGRET_FAULTS_MARK"
# Imports of a run before its first step. Ray reads its settings when it is imported, so each fork
# imports it.
MODULES = (
    "rltrain.trainer",
    "rltrain.pack",
    "rltrain.tools.preflight",
    "rltrain.engines.transformers",
    "harness.core.locks",
    "peft",
    "sweeps.dry_run",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "harness.run",
    "harness.sweep",
    "sweeps.session",
    "analysis.report.write",
    "optuna",
    "pyarrow.parquet",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a command.

    `status` is negative for a signal. `moment` says where a fault struck, and `seconds` are CPU
    seconds.
    """

    status: int
    output: str
    moment: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Return whether SIGKILL ended the command."""
        return self.status == -signal.SIGKILL


class WarmProcess:
    """The warm process, and the commands that it forks."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._count = 0
        self._mark = uuid.uuid4().hex
        threads = {
            MARK: self._mark,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=PROJECT,
            env={**os.environ, **threads},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self, command: str, *arguments: str, directory: Path, fault: Fault | None = None
    ) -> Outcome:
        """Run `python -m COMMAND ARGUMENTS`, with an optional fault in a run or sweep directory."""
        self._count += 1
        output, moment_file = (
            self._scratch / f"{self._count:04d}.{name}" for name in ("out", "moment")
        )
        request = {
            "command": command,
            "arguments": arguments,
            "directory": str(directory),
            "output": str(output),
            "moment": str(moment_file),
            "fault": None if fault is None else dataclasses.asdict(fault),
        }
        answer = self._ask(request)
        moment = moment_file.read_text() if moment_file.exists() else ""
        return Outcome(answer["status"], output.read_text(), moment, answer["seconds"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def mount(self, folder: Path, size: int | None = None) -> bool:
        """Mount a disk of `size` bytes for the commands, or make the folder read-only.

        Returns whether the system allowed it. Use `seen` to look at the folder from this process.
        """
        allowed: bool = self._ask({"mount": str(folder), "size": size})["mounted"]
        return allowed

    def seen(self, folder: Path) -> Path:
        """Return the path of a folder as the commands see it."""
        return Path(f"/proc/{self._process.pid}/root{folder}")

    def left_over(self) -> list[str]:
        """Return the command lines of processes that outlive the commands that started them."""
        command_lines = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != self._process.pid and process.environ().get(MARK) == self._mark:
                    command_lines.append(" ".join(process.cmdline()))
        return command_lines

    def close(self) -> None:
        """End the warm process."""
        self._process.communicate()


def serve() -> None:
    """Answer requests until there are no more."""
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    mounts = _Mounts()
    for line in sys.stdin:
        request = json.loads(line)
        if "mount" in request:
            print(
                json.dumps(mounts.answer(request["mount"], request["size"])),
                file=answers,
                flush=True,
            )
            continue
        fault = Fault(**request["fault"]) if request["fault"] else None
        pid = os.fork()
        if pid == 0:
            _become(request, fault)
        print(json.dumps(_wait(pid)), file=answers, flush=True)


def _become(request: dict[str, Any], fault: Fault | None) -> None:
    """Turn this process into the command, until the process ends."""
    os.setsid()
    output = os.open(request["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module = importlib.import_module(request["command"])
    sys.modules["__main__"] = module
    sys.argv = [module.__file__ or "", *request["arguments"]]
    if fault is not None:
        hooks.install(fault, Path(request["directory"]), Path(request["moment"]))
    status: Any = 1
    try:
        module.run_command(module.main)
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status or 0)


def _wait(pid: int) -> dict[str, Any]:
    """Wait for a child, and kill it after a time limit; return its status and CPU seconds."""
    alarm = threading.Timer(LONGEST, os.kill, (pid, signal.SIGKILL))
    alarm.start()
    _, status, used = os.wait4(pid, 0)
    alarm.cancel()
    return {"status": os.waitstatus_to_exitcode(status), "seconds": used.ru_utime + used.ru_stime}


class _Mounts:
    """Mounts that only the warm process and its forks see."""

    PRIVATE, BIND, REMOUNT, READ_ONLY, NEW_NAMESPACE = 0x44000, 0x1000, 0x20, 0x1, 0x20000

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._apart = False

    def answer(self, folder: str, size: int | None) -> dict[str, Any]:
        """Mount or resize a disk of `size` bytes at a folder, or make the folder read-only."""
        path = os.fsencode(folder)
        try:
            if not self._apart:
                self._check(self._libc.unshare(self.NEW_NAMESPACE))
                self._check(self._libc.mount(None, b"/", None, self.PRIVATE, None))
                self._apart = True
            if size is None:
                self._check(self._libc.mount(path, path, None, self.BIND, None))
                self._check(
                    self._libc.mount(
                        None, path, None, self.BIND | self.REMOUNT | self.READ_ONLY, None
                    )
                )
            else:
                flag = self.REMOUNT if os.path.ismount(folder) else 0
                self._check(
                    self._libc.mount(b"tmpfs", path, b"tmpfs", flag, f"size={size}".encode())
                )
        except PermissionError:
            return {"mounted": False}
        return {"mounted": True}

    def _check(self, status: int) -> None:
        if status:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    serve()
