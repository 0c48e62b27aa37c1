"""What every command shares: exit statuses and how an error is shown."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from harness.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes read like every other `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"see: python -m {self.prog} --help")


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command's `main(argv)` to its exit status: bad input exits 2, Ctrl-C 130, neither with a traceback."""
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
    sys.exit(status)
