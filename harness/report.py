"""`python -m harness.report DIR...`: write the report of sweeps, runs or their tables, and say what
it found.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.cli import Parser, invocation, run_command
from harness.core.errors import UserError, nearest, visible
from harness.records.run_dir import RunDir

if TYPE_CHECKING:
    from analysis.report.write import Report


def main(argv: list[str]) -> int:
    """Write the report and print its answer and its path."""
    arguments = _parse(argv)
    from analysis.data.records import check_own
    from analysis.data.tables import write_results
    from analysis.report.watch import watch_report
    from analysis.report.write import holds_tables, read, write

    directories: list[Path] = arguments.directories
    made = [directory for directory in directories if not holds_tables(directory)]
    sweeps = [
        directory.resolve() for directory in made if _manifest(directory).get("kind") == "sweep"
    ]
    folder = arguments.output or _folder(directories, bool(made))
    if arguments.output is None and made == directories and len(directories) == 1:
        check_own(RunDir(directories[0]), folder, folder / "figures", folder / "tables")

    def report(refresh: int | None = None) -> Report:
        found = read(directories)
        for experiment in found:
            if experiment.path in sweeps:
                write_results(experiment.path, experiment.trials)
        return write(found, folder, refresh=refresh, processes=os.cpu_count() or 1)

    try:
        if arguments.watch is None:
            written = report()
        else:
            written = watch_report(report, made, every=arguments.watch, begun=_begun)
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(
            "cannot write the report",
            got=f"{error.filename}: {error.strerror}",
            fix="name another folder with --output",
        ) from None
    print(visible(written.answer))
    print(f"report: {written.path}")
    return 0


def _begun(first: Report) -> None:
    print(f"live: {first.path} (Ctrl-C ends the watch, not the sweep)", flush=True)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog=invocation("report"),
        description="Write the report of sweeps and runs; of several, one page.",
    )
    where = "a sweep's or a run's directory, or a folder of tables that a report wrote"
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help=where)
    parser.add_argument(
        "--output",
        type=Path,
        help="where the report goes (default: DIR/report; for tables, the folder they are in; for "
        "several, `comparison` beside the first)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="all on one page, as several DIRs are anyway; an error with one alone",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        const=5,
        type=int,
        metavar="SECONDS",
        help="write the page again at each change, until what it shows has ended",
    )
    arguments = parser.parse_args(argv)
    if (
        arguments.compare
        and len(arguments.directories) < 2
        and not _tables_of_several(arguments.directories[0])
    ):
        raise UserError(
            "--compare puts several sweeps or runs on one page",
            got=arguments.directories[0],
            allowed="two or more directories",
        )
    return arguments


def _tables_of_several(directory: Path) -> bool:
    from analysis.data.tables import Tables
    from analysis.report.write import holds_tables

    return holds_tables(directory) and len(Tables.read(directory).sources) > 1


def _folder(directories: list[Path], made: bool) -> Path:
    """Where a report goes that was not told where."""
    first = directories[0]
    if len(directories) > 1:
        return first.resolve().parent / "comparison"
    return RunDir(first).report if made else first.resolve().parent


def _manifest(directory: Path) -> dict[str, object]:
    """The manifest of a run or sweep; raises UserError naming those that lie under runs/ or under
    `directory`.
    """
    from analysis.data.records import check_own

    run = RunDir(directory)
    if run.manifest.is_file():
        check_own(run, run.manifest)
        return run.read_manifest()
    here = directory if directory.is_dir() else Path("runs")
    known = sorted(str(found.parent) for found in here.glob("*/manifest.json"))
    guess = nearest(str(directory), known)
    raise UserError(
        "not a run or sweep: there is no manifest.json",
        got=directory,
        allowed=", ".join(known) or f"nothing yet: {here}/ holds no run",
        fix=f"did you mean {guess}?"
        if guess
        else "name a directory that a run or a sweep has made",
    )


if __name__ == "__main__":
    run_command(main)
