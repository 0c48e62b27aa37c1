"""Parts that all commands share: their names, exit statuses and how errors are shown."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from harness.errors import UserError

# A full disk, a quota, a file-size limit, a read-only or somebody else's directory, a broken disk.
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


SCRIPT = "noregret"
GPU_MEMORY = "plan for GPUs that are not here: GiB of each that the recipe asks for (80), or so many of so much (8x80)"


def started_by_script() -> bool:
    """Return whether the console script started this process, not `python -m`."""
    return Path(sys.argv[0]).stem == SCRIPT


def invocation(command: str) -> str:
    """Return how the user types a command: `noregret run` or `python -m harness.run`."""
    return f"{SCRIPT} {command}" if started_by_script() else f"python -m harness.{command}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes read like every other `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"see: {self.prog} --help")


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's `main(argv)` to its exit status, and show errors without a traceback.

    Bad input exits 2, as do files that cannot be written; Ctrl-C exits 130.
    """
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader of our output has gone (| head): not an error, and nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(
            UserError(
                "a file cannot be written", got=f"{error.filename}: {error.strerror}",
                fix="make room or allow it, then go on with --resume: what was saved is as it was",
            ),
            file=sys.stderr,
        )  # fmt: skip
        status = 2
    sys.exit(status)
