"""Parts that all commands share: their names, exit statuses, and how errors are printed."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from harness.core.errors import UserError, machine_error

SCRIPT = "noregret"
GPU_MEMORY = (
    "plan for GPUs that are not here: GiB of each that the recipe asks for (80), "
    "or so many of so much (8x80)"
)


def started_by_script() -> bool:
    """Return whether the console script started this process, not `python -m`."""
    return Path(sys.argv[0]).stem == SCRIPT


def invocation(command: str) -> str:
    """Return how the user types a command: `noregret run` or `python -m harness.run`."""
    return f"{SCRIPT} {command}" if started_by_script() else f"python -m harness.{command}"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"see: {self.prog} --help")


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's `main(argv)` and exit with its status; errors are shown without a traceback.

    The status is 2 for bad input and for a failure of the machine such as a full disk, 130 for
    Ctrl-C, and 141 for a closed output.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt_once)
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        if not _reader_gone():
            raise
        # Like a program that SIGPIPE ends, as with `| head`. Devnull takes what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:
        machine = machine_error(error, writes=["/"])
        if machine is None:
            raise
        fix = f"{machine.fix}, then continue with --resume: saved files are unchanged"
        print(UserError(machine.what, got=machine.got, fix=fix), file=sys.stderr)
        status = 2
    sys.exit(status)


def interrupt_once(sent: int, _: object) -> NoReturn:
    """Stop a command with KeyboardInterrupt; further signals do not interrupt its cleanup."""
    for number in (sent, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _reader_gone() -> bool:
    """Return whether stdout's reader has closed it; else a pipe broke in a reward or a library."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
