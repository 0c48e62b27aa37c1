"""Write the report of runs and sweeps, once or whenever something changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from analysis.data.records import check_inside
from analysis.data.tables import TABLES, Tables, load
from analysis.experiment import Experiment
from analysis.report import content, markup
from analysis.report.drawings import draw_all
from harness.core.errors import UserError
from harness.records.files import write_text
from harness.records.run_dir import RunDir, Status

# The folder of the tables beside the page, and the command that makes the page from them.
FOLDER = "tables"
REDRAW = f"python -m harness.report {FOLDER} --output ."
DOWNLOADS = [
    ("trials.csv", "a row per trial"),
    (f"{FOLDER}/runs.parquet", "a row per run: settings, outcome, cost"),
    (f"{FOLDER}/steps.parquet", "a row per run and logged step"),
    (f"{FOLDER}/samples.parquet", "rewards per held-out problem, and the completions shown here"),
    (f"{FOLDER}/sources.parquet", "a row per run or sweep directory: manifest and recipe"),
]
# Drawing takes seconds of a core that the sweep could use: a live page rests this many times as
# long after it.
REST = 4
Written = TypeVar("Written")


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """The path of a report's page, and its answer in one paragraph."""

    path: Path
    answer: str


def read(directories: Sequence[str | Path]) -> list[Experiment]:
    """Read the experiments of runs', sweeps' and tables' folders; raises UserError for others."""
    tables = Tables.joined(
        Tables.read(directory) if holds_tables(directory) else load([directory])
        for directory in directories
    )
    return [Experiment.of(tables, str(directory)) for directory in tables.sources["directory"]]


def holds_tables(directory: str | Path) -> bool:
    """Return whether a folder holds a report's tables rather than a run or a sweep."""
    return all((Path(directory) / name).is_file() for name in TABLES)


def report_folder(directory: str | Path) -> Path:
    """Return a run's or sweep's folder for its report; raises UserError where a link leads out."""
    run = RunDir(directory)
    check_inside(run, run.report, run.report / "figures", run.report / FOLDER)
    return run.report


def write(
    experiments: list[Experiment], folder: Path, *, refresh: int | None = None, processes: int = 1
) -> WrittenReport:
    """Write `index.html`, `report.md`, the figures' PNGs, `trials.csv` and the tables.

    Several experiments share one page. The page loads nothing from elsewhere. It is made from the
    tables alone, and equal tables give equal bytes. With `refresh` it reloads itself every so many
    seconds; `processes` draw its figures.
    """
    if not experiments:
        raise UserError("there is nothing to report", got="tables without a run or sweep")
    tables = lean(experiments)
    # From what is written below, so that this page equals one made from the tables.
    experiments = [Experiment.of(tables, experiment.directory) for experiment in experiments]
    figures = folder / "figures"
    if len(experiments) == 1:
        page, template = content.single(experiments[0]), "report"
        page["figures"] = draw_all({"": experiments[0]}, figures, processes)[""]
        answer = page["answer"].text()
    else:
        page, template = content.comparison(experiments), "compare"
        parts = {f"{part['anchor']}-": part for part in page["parts"]}
        drawn = draw_all(dict(zip(parts, experiments, strict=True)), figures, processes)
        for prefix, part in parts.items():
            part["figures"] = drawn[prefix]
        answer = "\n".join(f"{part['name']}: {part['answer'].text()}" for part in page["parts"])
    page |= {"refresh": refresh, "downloads": DOWNLOADS, "redraw": REDRAW}
    write_text(folder / "report.md", markup.markdown(f"{template}.md.j2", page))
    write_text(folder / "index.html", markup.fill(f"{template}.html.j2", page))
    tables.write(folder / FOLDER)
    write_text(folder / "trials.csv", tables.runs.to_csv(index=False))
    return WrittenReport(folder / "index.html", answer)


def lean(experiments: Sequence[Experiment]) -> Tables:
    """Return the experiments' tables with only the samples that a report uses.

    These are the last evaluation of each run and, of the runs whose completions are shown, the
    first as well. Only the latter keep their texts.
    """
    parts = []
    for experiment in experiments:
        best = experiment.best_trial()
        shown = "." if not experiment.is_sweep else None if best is None else str(best["run_dir"])
        samples = experiment.tables.samples
        held = samples[samples["phase"] == "eval"]
        is_shown = held["run_dir"] == shown
        last = held["step"] == held.groupby("run_dir")["step"].transform("max")
        kept = held[last | (is_shown & (held["step"] == 0))].copy()
        texts = ["question", "ground_truth", "completion"]
        kept.loc[kept["run_dir"] != shown, [name for name in texts if name in kept]] = None
        parts.append(replace(experiment.tables, samples=kept.reset_index(drop=True)))
    return Tables.joined(parts)


def watch(
    write_page: Callable[[int | None], Written],
    directories: Sequence[Path],
    *,
    every: int = 5,
    begun: Callable[[Written], None] | None = None,
) -> Written:
    """Call `write_page(every)` at each change until all runs have ended, or until Ctrl-C.

    Then return `write_page(None)`, the page that stays. `begun` gets the first result. Raises
    UserError when `every`, in seconds, is not positive.
    """
    if every < 1:
        what = "the page is written again every so many seconds"
        raise UserError(what, got=every, allowed="1 or more")
    running, seen = (Status.CREATED, Status.RUNNING), None
    try:
        while any(RunDir(directory).status in running for directory in directories):
            state = [_state(directory) for directory in directories]
            start = time.monotonic()
            if state != seen:
                written = write_page(every)
                if seen is None and begun is not None:
                    begun(written)
            seen = state
            time.sleep(max(every, REST * (time.monotonic() - start)))
    except KeyboardInterrupt:
        pass  # ends the watch; the sweep continues
    return write_page(None)


def _state(directory: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file that a page is made from."""
    run, state = RunDir(directory), {}
    for folder in (run.path, *sorted(run.trials.glob("*"))):
        for file in (folder / "manifest.json", folder / "metrics.jsonl"):
            try:
                about = file.stat()
            except OSError:  # the file may go meanwhile
                continue
            state[str(file)] = (about.st_size, about.st_mtime_ns)
    return state
