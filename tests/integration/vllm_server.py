"""Run `vllm serve` for a test, on a free port, and end it with all its children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

START_SECONDS = 240
STOP_SECONDS = 20


@dataclass(frozen=True)
class Server:
    """A running `vllm serve` process."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def wait_until_up(self) -> None:
        """Wait until the server answers.

        Fails with its log when it ends or is too slow.
        """
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.address}/health", timeout=5),
            ):
                return
            time.sleep(0.2)
        raise AssertionError(f"vllm serve did not start:\n{self.log.read_text()[-4000:]}")

    def alive(self) -> bool:
        """Return whether any process of the server's group is left."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def stop(self) -> None:
        """Terminate the server, and kill what has not ended after a grace period."""
        self.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while self.alive() and time.monotonic() < deadline:
            self.process.poll()  # reaps the process
            time.sleep(0.1)
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def serving(model: Path, work: Path, *arguments: str) -> Iterator[Server]:
    """Start `vllm serve model` on a CPU with further arguments, without waiting for it.

    Its log and temporary files go to `work`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--enforce-eager",
        *arguments,
    ]
    log = work / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(work),
            start_new_session=True,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        yield server
    finally:
        server.stop()


def ask(
    server: Server, model: str, messages: list[dict[str, str]], *, max_tokens: int
) -> dict[str, Any]:
    """Return the server's greedy answer to a chat, with token ids of prompt and completion."""
    body = {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{server.address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error}: {error.read().decode()}") from None
    return answer


def _environment(work: Path) -> dict[str, str]:
    """Return an environment with one thread, a small cache and no usage report.

    Everything is written inside `work`, and no setting of this process's vLLM is kept.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return {
        **inherited,
        "PYTHONPATH": str(_alias(work)),
        "TMPDIR": str(work),
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(work / "cache"),
        "VLLM_CONFIG_ROOT": str(work / "config"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def _alias(work: Path) -> Path:
    """Return a folder in which the CPU build is also named vllm.

    The command asks for the version of a package of that name, and fails without.
    """
    with contextlib.suppress(metadata.PackageNotFoundError):
        version = metadata.version("vllm-cpu")
        folder = work / f"vllm-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        )
    return work
