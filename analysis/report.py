"""The report of runs and sweeps: one self-contained HTML page, the same in short in Markdown, and the tables."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from analysis import content, markup
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot, all_figures
from analysis.figures.theme import Look, darkened, render, render_both
from analysis.load import TABLES, Tables, load
from analysis.records import check_own
from harness.errors import UserError
from harness.rundir import RunDir, write_bytes, write_text

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
_SIZE = re.compile(rb'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"')
# CSS pixels in a point, an SVG's unit here.
_POINT = 96 / 72


@dataclass(frozen=True, slots=True)
class Report:
    """A written report: where it is, and its answer in one paragraph."""

    path: Path
    answer: str


def read(directories: Sequence[str | Path]) -> list[Experiment]:
    """The experiments of runs', sweeps' and tables' folders; raises UserError for anything else."""
    tables = Tables.joined(
        Tables.read(directory) if holds_tables(directory) else load([directory]) for directory in directories
    )
    return [Experiment.of(tables, str(directory)) for directory in tables.sources["directory"]]


def holds_tables(directory: str | Path) -> bool:
    """Whether a folder holds tables that a report wrote, rather than a run or a sweep."""
    return all((Path(directory) / name).is_file() for name in TABLES)


def write_report(directory: str | Path, output: str | Path | None = None, *, refresh: int | None = None) -> Report:
    """Write the report of a run, a sweep or a folder of tables into `output` (default: the directory's `report/`).

    Raises UserError when `directory` is none of these. `refresh`: the page loads itself again after so many seconds.
    """
    run = RunDir(directory)
    folder = Path(output) if output is not None else run.report
    experiments = read([directory])
    if output is None:
        check_own(run, folder, folder / "figures", folder / FOLDER)
    return write(experiments, folder, refresh=refresh)


def write(experiments: list[Experiment], folder: Path, *, refresh: int | None = None) -> Report:
    """Write `index.html`, `report.md`, the figures' PNGs, `trials.csv` and the tables; several experiments on one page.

    The page loads nothing from anywhere. It is made from the tables alone: the same tables give the same bytes.
    """
    if not experiments:
        raise UserError("there is nothing to report", got="tables without a run or sweep")
    tables = lean(experiments)
    # From what is written below, so that this page and one made from the tables are the same.
    experiments = [Experiment.of(tables, experiment.directory) for experiment in experiments]
    shared = {"refresh": refresh, "downloads": DOWNLOADS, "redraw": REDRAW}
    if len(experiments) == 1:
        found, template = content.single(experiments[0]), "report"
        found["figures"] = _figures(experiments[0], folder / "figures", "")
        answer = found["answer"].text()
    else:
        found, template = content.comparison(experiments), "compare"
        for one, experiment in zip(found["parts"], experiments, strict=True):
            one["figures"] = _figures(experiment, folder / "figures", f"{one['anchor']}-")
        answer = "\n".join(f"{one['name']}: {one['answer'].text()}" for one in found["parts"])
    write_text(folder / "report.md", markup.markdown(f"{template}.md.j2", {**found, **shared}))
    write_text(folder / "index.html", markup.fill(f"{template}.html.j2", {**found, **shared}))
    tables.write(folder / FOLDER)
    write_text(folder / "trials.csv", tables.runs.to_csv(index=False))
    return Report(folder / "index.html", answer)


def lean(experiments: Sequence[Experiment]) -> Tables:
    """The experiments' tables with the samples that a report uses: of evaluations, all text but what is shown dropped.

    Kept are the last evaluation of each run, and of the runs whose completions are shown the first, with their text.
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
        texts = [name for name in ("question", "ground_truth", "completion") if name in kept.columns]
        kept.loc[kept["run_dir"] != shown, texts] = None
        parts[place] = Tables(parts[place].runs, parts[place].steps, kept.reset_index(drop=True), parts[place].sources)
    return Tables.joined(parts)


def _figures(experiment: Experiment, folder: Path, prefix: str) -> list[dict[str, Any]]:
    """Every figure that an experiment has enough for, written as PNG and embedded as SVG."""
    drawn = []
    for figure in all_figures():
        for plot in figure.data(experiment):
            wide, png = render_both(partial(figure.draw, plot.data), Look())
            write_bytes(folder / f"{prefix}{plot.name}.png", png)
            drawn.append(_embedded(figure, plot, prefix, wide))
    return drawn


def _embedded(figure: Figure, plot: Plot, prefix: str, wide: bytes) -> dict[str, Any]:
    """A plot with its four drawings (light or dark, wide or narrow) as data URIs, and their sizes in pixels."""
    draw = partial(figure.draw, plot.data)
    found: dict[str, Any] = {}
    for narrow, light in ((False, wide), (True, render(draw, Look(narrow=True)))):
        dark = render(draw, Look(True, narrow)) if figure.dark_apart else darkened(light)
        width = "narrow" if narrow else "wide"
        found |= {f"light_{width}": _uri(light), f"dark_{width}": _uri(dark), f"{width}_size": _size(light)}
    return {"name": f"{prefix}{plot.name}", "title": plot.title, "reading": plot.reading, "alt": plot.alt, **found}


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _size(svg: bytes) -> tuple[int, int]:
    found = _SIZE.search(svg)
    assert found is not None
    return round(float(found[1]) * _POINT), round(float(found[2]) * _POINT)
