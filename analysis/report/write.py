"""The report of runs and sweeps: one self-contained HTML page, the same in short in Markdown, and
the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.data.records import check_own
from analysis.data.tables import TABLES, Tables, load
from analysis.experiment import Experiment
from analysis.report import content, markup
from analysis.report.drawings import draw_all
from harness.core.errors import UserError
from harness.records.run_dir import RunDir, write_text

# Where the tables lie beside the page, and how they make it again from there.
FOLDER = "tables"
REDRAW = f"python -m harness.report {FOLDER} --output ."
DOWNLOADS = [
    ("trials.csv", "a row per trial"),
    (f"{FOLDER}/runs.parquet", "a row per run: settings, outcome, cost"),
    (f"{FOLDER}/steps.parquet", "a row per run and logged step"),
    (f"{FOLDER}/samples.parquet", "rewards per held-out problem, and the completions shown here"),
    (f"{FOLDER}/sources.parquet", "a row per run or sweep directory: manifest and recipe"),
]


@dataclass(frozen=True, slots=True)
class Report:
    """A written report: where it is, and its answer in one paragraph."""

    path: Path
    answer: str


def read(directories: Sequence[str | Path]) -> list[Experiment]:
    """The experiments of runs', sweeps' and tables' folders; raises UserError for anything else."""
    tables = Tables.joined(
        Tables.read(directory) if holds_tables(directory) else load([directory])
        for directory in directories
    )
    return [Experiment.of(tables, str(directory)) for directory in tables.sources["directory"]]


def holds_tables(directory: str | Path) -> bool:
    """Whether a folder holds tables that a report wrote, rather than a run or a sweep."""
    return all((Path(directory) / name).is_file() for name in TABLES)


def write_report(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    refresh: int | None = None,
    processes: int = 1,
) -> Report:
    """Write the report of a run, a sweep or a folder of tables into `output` (default: the
    directory's `report/`).

    Raises UserError when `directory` is none of these. `refresh` and `processes` as in `write`.
    """
    run = RunDir(directory)
    folder = Path(output) if output is not None else run.report
    experiments = read([directory])
    if output is None:
        check_own(run, folder, folder / "figures", folder / FOLDER)
    return write(experiments, folder, refresh=refresh, processes=processes)


def write(
    experiments: list[Experiment], folder: Path, *, refresh: int | None = None, processes: int = 1
) -> Report:
    """Write `index.html`, `report.md`, the figures' PNGs, `trials.csv` and the tables; several
    experiments on one page.

    The page loads nothing from anywhere. It is made from the tables alone: the same tables give the
    same bytes. `refresh`: it loads itself again after so many seconds. `processes`: how many draw
    its figures.
    """
    if not experiments:
        raise UserError("there is nothing to report", got="tables without a run or sweep")
    tables = lean(experiments)
    # From what is written below, so that this page and one made from the tables are the same.
    experiments = [Experiment.of(tables, experiment.directory) for experiment in experiments]
    shared = {"refresh": refresh, "downloads": DOWNLOADS, "redraw": REDRAW}
    if len(experiments) == 1:
        found, template = content.single(experiments[0]), "report"
        found["figures"] = draw_all({"": experiments[0]}, folder / "figures", processes)[""]
        answer = found["answer"].text()
    else:
        found, template = content.comparison(experiments), "compare"
        prefixes = [f"{one['anchor']}-" for one in found["parts"]]
        drawn = draw_all(
            dict(zip(prefixes, experiments, strict=True)), folder / "figures", processes
        )
        for one, prefix in zip(found["parts"], prefixes, strict=True):
            one["figures"] = drawn[prefix]
        answer = "\n".join(f"{one['name']}: {one['answer'].text()}" for one in found["parts"])
    write_text(folder / "report.md", markup.markdown(f"{template}.md.j2", {**found, **shared}))
    write_text(folder / "index.html", markup.fill(f"{template}.html.j2", {**found, **shared}))
    tables.write(folder / FOLDER)
    write_text(folder / "trials.csv", tables.runs.to_csv(index=False))
    return Report(folder / "index.html", answer)


def lean(experiments: Sequence[Experiment]) -> Tables:
    """The experiments' tables with the samples that a report uses: of evaluations, all text but
    what is shown dropped.

    Kept are the last evaluation of each run, and of the runs whose completions are shown the first,
    with their text.
    """
    parts = [experiment.tables for experiment in experiments]
    for place, experiment in enumerate(experiments):
        best = experiment.best_trial()
        shown = "." if not experiment.is_sweep else None if best is None else str(best["run_dir"])
        samples = parts[place].samples
        held = samples[samples["phase"] == "eval"]
        own = held["run_dir"] == shown
        last = held["step"] == held.groupby("run_dir")["step"].transform("max")
        kept = held[last | (own & (held["step"] == 0))].copy()
        texts = [
            name for name in ("question", "ground_truth", "completion") if name in kept.columns
        ]
        kept.loc[kept["run_dir"] != shown, texts] = None
        parts[place] = Tables(
            parts[place].runs, parts[place].steps, kept.reset_index(drop=True), parts[place].sources
        )
    return Tables.joined(parts)
