"""`python -m harness.report DIR...`: write the report of sweeps, runs or their tables."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.cli import Parser, invocation, run_command
from harness.core.errors import UserError, nearest, visible
from harness.records.run_dir import RunDir

if TYPE_CHECKING:
    from analysis.report import Report


def main(argv: list[str]) -> int:
    """Write the report, print its answer and its path, and return the exit status."""
    arguments = _parse(argv)
    from analysis.load import write_results
    from analysis.records import check_own
    from analysis.report import holds_tables, read, write
    from analysis.watch import watch_report

    directories: list[Path] = arguments.directories
    runs = [directory for directory in directories if not holds_tables(directory)]
    sweeps = [
        directory.resolve() for directory in runs if _manifest(directory).get("kind") == "sweep"
    ]
    folder = arguments.output or _folder(directories, bool(runs))
    if arguments.output is None and runs == directories and len(directories) == 1:
        check_own(RunDir(directories[0]), folder, folder / "figures", folder / "tables")

    def report(refresh: int | None = None) -> Report:
        experiments = read(directories)
        for experiment in experiments:
            if experiment.path in sweeps:
                write_results(experiment.path, experiment.trials)
        return write(experiments, folder, refresh=refresh, processes=os.cpu_count() or 1)

    try:
        if arguments.watch is None:
            written = report()
        else:
            written = watch_report(report, runs, every=arguments.watch, begun=_begun)
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
    from analysis.load import Tables
    from analysis.report import holds_tables

    return holds_tables(directory) and len(Tables.read(directory).sources) > 1


def _folder(directories: list[Path], of_runs: bool) -> Path:
    """Return the default folder of a report: of runs or sweeps if `of_runs`, else of tables."""
    first = directories[0]
    if len(directories) > 1:
        return first.resolve().parent / "comparison"
    return RunDir(first).report if of_runs else first.resolve().parent


def _manifest(directory: Path) -> dict[str, object]:
    """Return the manifest of a run or sweep.

    Raises UserError where there is none, with the runs and sweeps in `directory` or in runs/.
    """
    from analysis.records import check_own

    run = RunDir(directory)
    if run.manifest.is_file():
        check_own(run, run.manifest)
        return run.read_manifest()
    here = directory if directory.is_dir() else Path("runs")
    known = sorted(str(file.parent) for file in here.glob("*/manifest.json"))
    guess = nearest(str(directory), known)
    raise UserError(
        "not a run or sweep: there is no manifest.json",
        got=directory,
        allowed=", ".join(known) or f"nothing yet: {here}/ holds no run",
        fix=f"did you mean {guess}?" if guess else "name the directory of a run or a sweep",
    )


if __name__ == "__main__":
    run_command(main)
