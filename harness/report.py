"""`python -m harness.report DIR`: write the report of a sweep or a run, and say what it found."""

from __future__ import annotations

from pathlib import Path

from analysis.load import write_results
from analysis.records import check_own
from analysis.report import write_report
from harness.cli import Parser, run_command
from harness.errors import UserError, nearest, visible
from harness.rundir import RunDir


def main(argv: list[str]) -> int:
    """Write the report and print its answer and its path."""
    parser = Parser(prog="harness.report", description="Write the HTML and Markdown report of a sweep or a run.")
    parser.add_argument("directory", type=Path, help="a sweep's or a run's directory, e.g. runs/quickstart")
    parser.add_argument("--output", type=Path, help="where the report goes (default: DIRECTORY/report)")
    arguments = parser.parse_args(argv)
    manifest = _manifest(arguments.directory)
    if manifest.get("kind") == "sweep":
        write_results(arguments.directory)
    try:
        report = write_report(arguments.directory, arguments.output)
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError("cannot write the report", got=f"{error.filename}: {error.strerror}",
                        fix="name another folder with --output") from None  # fmt: skip
    print(visible(report.answer))
    print(f"report: {report.path}")
    return 0


def _manifest(directory: Path) -> dict[str, object]:
    """The manifest of a run or sweep; raises UserError naming those that lie under runs/ or under `directory`."""
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
        fix=f"did you mean {guess}?" if guess else "name a directory that a run or a sweep has made",
    )


if __name__ == "__main__":
    run_command(main)
