"""The report of a run or sweep: one self-contained HTML page, and the same in Markdown."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from analysis import labels, page, reading, rerun, stats, tables
from analysis.experiment import Experiment
from analysis.figures import Figure, Plot, all_figures
from analysis.figures.theme import Look, render
from analysis.records import check_own
from harness.rundir import RunDir, write_bytes, write_text


@dataclass(frozen=True, slots=True)
class Report:
    """A written report: where it is, and its answer in one paragraph."""

    path: Path
    answer: str


def write_report(directory: str | Path, output: str | Path | None = None) -> Report:
    """Write `index.html`, `report.md` and the figures' PNGs into `output` (default: the directory's `report/`).

    The page loads nothing from anywhere. Raises UserError when `directory` is neither a run nor a sweep.
    """
    experiment = Experiment.open(directory)
    run = RunDir(directory)
    folder = Path(output) if output is not None else run.report
    if output is None:
        check_own(run, folder, folder / "figures")
    answer = reading.answer(experiment)
    figures = [(figure, plot) for figure in all_figures() for plot in figure.data(experiment)]
    for figure, plot in figures:
        write_bytes(folder / "figures" / f"{plot.name}.png", render(partial(figure.draw, plot.data), Look(), "png"))
    content = {**_content(experiment), "answer": answer}
    environment = _environment()
    markdown = environment.get_template("report.md.j2").render(**content, figures=[plot for _, plot in figures])
    write_text(folder / "report.md", re.sub(r"\n{3,}", "\n\n", markdown))
    html = environment.get_template("report.html.j2").render(**content, figures=[_embedded(*item) for item in figures])
    write_text(folder / "index.html", html)
    return Report(folder / "index.html", answer.text())


def _content(experiment: Experiment) -> dict[str, Any]:
    trial = experiment.best_trial()
    run_dir = None if trial is None else str(trial["run_dir"])
    if not experiment.is_sweep:
        run_dir = "."
    return {
        "name": experiment.name,
        "sweep": experiment.is_sweep,
        "metric": labels.metric(experiment.metric),
        "better": "higher" if experiment.direction == "maximize" else "lower",
        "standing": reading.standing(experiment),
        "command": rerun.command(experiment, run_dir) if run_dir else None,
        "best_dir": run_dir,
        "configurations": tables.configurations(experiment) if experiment.is_sweep else None,
        "rates": reading.rate_rows(experiment),
        "good_share": f"{stats.GOOD_SHARE:.0%}",
        "trials": tables.trials(experiment),
        "problems": page.problems(experiment, run_dir) if run_dir else [],
        "method": page.method(experiment),
        "provenance": page.provenance(experiment),
    }


def _embedded(figure: Figure, plot: Plot) -> dict[str, Any]:
    """A plot with its four drawings (light or dark, wide or narrow) as data URIs."""
    drawings = {}
    for dark in (False, True):
        for narrow in (False, True):
            svg = render(partial(figure.draw, plot.data), Look(dark, narrow), "svg")
            name = f"{'dark' if dark else 'light'}_{'narrow' if narrow else 'wide'}"
            drawings[name] = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return {"name": plot.name, "title": plot.title, "reading": plot.reading, "alt": plot.alt, **drawings}


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=select_autoescape(["html.j2"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _markdown_cell
    environment.filters["fenced"] = _fenced
    environment.filters["code"] = _code
    return environment


def _markdown_cell(text: object) -> str:
    """Text that can neither leave its Markdown table cell nor become a link, an image, code or HTML."""
    escaped = re.sub(r"([\\`*\[\]|<])", r"\\\1", str(text).replace("&", "&amp;"))
    return " ".join(escaped.split())


def _fenced(text: str, language: str = "text") -> str:
    """Text in a code fence longer than any run of backticks within it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    """Text on one line between backticks, which it cannot end."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"
