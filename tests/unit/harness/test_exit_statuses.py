"""How a command ends: with 0 only where it did what it was asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from harness.core.paths import PROJECT

START = "import sys, time\nfrom harness.core.cli import run_command\n"
READER_GONE = "sys.stdin.readline(); print('too late', flush=True); return 0"
PIPE_BROKE_ELSEWHERE = "raise BrokenPipeError(32, 'Broken pipe')"
NO_ROOM = "raise OSError(28, 'No space left on device', '/full/file')"


def started(body: str) -> subprocess.Popen[str]:
    program = f"{START}def main(argv):\n    {body}\nrun_command(main)\n"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        text=True,
        preexec_fn=_heed,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _heed() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("return 0", 0, ""),
        (PIPE_BROKE_ELSEWHERE, 1, "BrokenPipeError: [Errno 32] Broken pipe"),
        (
            NO_ROOM,
            2,
            "No space left on device\n  fix:     make room, then continue with --resume",
        ),
        ("raise SystemExit(0)", 0, ""),  # --help
    ],
)
def test_exit_status(body: str, status: int, said: str) -> None:
    with started(body) as process:
        _, told = process.communicate(timeout=30)
    assert process.returncode == status
    assert said in told


def test_output_that_nobody_reads_any_more_is_no_success() -> None:
    with started(READER_GONE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(30) == 128 + signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_many_interrupts_are_one() -> None:
    body = "\n    ".join(
        [
            "try:",
            "    print('up', flush=True)",
            "    time.sleep(60)",
            "finally:",
            "    print('tidying up', flush=True)",
            "    time.sleep(0.5)",
            "    print('tidy', flush=True)",
        ]
    )
    with started(body) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "up\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "tidying up\n"
        for _ in range(3):
            os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stdout.read() == "tidy\n"
        assert process.stderr.read() == "interrupted\n"
