"""The console script: `noregret COMMAND ...` is `python -m harness.COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from typing import NoReturn

from harness.core.cli import SCRIPT, run_command
from harness.core.errors import UserError, nearest

COMMANDS = {
    "run": "train one run of a recipe",
    "sweep": "run every trial of a recipe's sweep, and write its report",
    "report": "write the report of sweeps and runs",
    "prepare": "make data files, or the tiny model",
    "reproduce": "train a run again, and compare the two step by step",
    "check": "train a recipe once per seed, and check what it expects",
    "evaluate": "score a run's policy on other problems",
    "export": "export a run's policy for transformers, PEFT and vLLM",
}


def script() -> NoReturn:
    """Run the console script."""
    # As with `python -m`, modules in the working directory can be imported: a user's environment.
    sys.path.append("")
    run_command(main)


def main(argv: list[str]) -> int:
    """Run the command that `argv` begins with, or list the commands; return the exit status.

    Only that command is imported. Raises UserError for an unknown command.
    """
    name, *arguments = argv or ["--help"]
    if name in ("-h", "--help"):
        commands = "\n".join(f"  {name:<11}{line}" for name, line in COMMANDS.items())
        print(f"usage: {SCRIPT} COMMAND ...\n\n{commands}\n")
        print(f"{SCRIPT} COMMAND --help describes one, {SCRIPT} --version prints the version.")
        return 0
    if name == "--version":
        print(f"{SCRIPT} {metadata.version(SCRIPT)}")
        return 0
    if name not in COMMANDS:
        guess = nearest(name, COMMANDS)
        raise UserError(
            "no such command",
            got=name,
            allowed=", ".join(COMMANDS),
            fix=f"did you mean {SCRIPT} {guess}?" if guess else f"see: {SCRIPT} --help",
        )
    status: int = importlib.import_module(f"harness.{name}").main(arguments)
    return status
