"""`python -m harness.report DIR...`: write the report of sweeps, runs or their tables."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.cli import Parser, invocation, run_command
from harness.core.errors import UserError, nearest, visible
from harness.core.paths import shown
from harness.records.run_dir import RunDir

if TYPE_CHECKING:
    from analysis.report.write import WrittenReport


def main(argv: list[str]) -> int:
    """Write the report, print its answer and its path, and return the exit status."""
    arguments = _parse(argv)
    from analysis.data.tables import write_results
    from analysis.report.write import holds_tables, read, report_folder, watch, write

    directories: list[Path] = arguments.directories
    runs = [directory for directory in directories if not holds_tables(directory)]
    sweeps = [
        shown(directory.resolve())
        for directory in runs
        if _manifest(directory).get("kind") == "sweep"
    ]
    if arguments.output is not None:
        folder = arguments.output
    elif len(directories) > 1:
        folder = directories[0].resolve().parent / "comparison"
    else:
        first = directories[0]
        folder = report_folder(first) if runs else first.resolve().parent

    def report(refresh: int | None = None) -> WrittenReport:
        experiments = read(directories)
        if arguments.compare and len(experiments) < 2:
            raise UserError(
                "--compare puts several sweeps or runs on one page",
                got=directories[0],
                allowed="two or more directories",
            )
        for experiment in experiments:
            if experiment.directory in sweeps:
                write_results(experiment.directory, experiment.trials)
        return write(experiments, folder, refresh=refresh, processes=os.cpu_count() or 1)

    try:
        if arguments.watch is None:
            written = report()
        else:
            written = watch(report, runs, every=arguments.watch, begun=_begun)
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(
            "cannot write the report",
            got=f"{error.filename}: {error.strerror}",
            fix="name another folder with --output",
        ) from None
    print(visible(written.answer))
    print(f"report: {written.path}")
    return 0


def _begun(first: WrittenReport) -> None:
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
    return parser.parse_args(argv)


def _manifest(directory: Path) -> dict[str, object]:
    """Return the manifest of a run or sweep.

    Raises UserError where there is none, with the runs and sweeps in `directory` or in runs/.
    """
    from analysis.data.records import check_inside

    run = RunDir(directory)
    if run.manifest.is_file():
        check_inside(run, run.manifest)
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
