"""Experiments made from tables alone, for figures: settings and scores as a test states them,
nothing on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.data import columns, rows
from analysis.data.labels import ALPHA, LR, RANK, TARGETS
from analysis.data.tables import Tables
from analysis.experiment import Experiment
from analysis.figures.drawing.render import Draw, render
from analysis.figures.drawing.theme import Look

BATCH = "trainer.policy_mini_batch_size"
KEYS = {"rank": RANK, "alpha": ALPHA, "lr": LR, "targets": TARGETS, "batch_size": BATCH}
DIRECTORY = "runs/made"
# What `rows.with_totals` adds, and what it makes that from.
_TOTALS, _RATES = (
    ["episodes", "flops", "tokens", "update_seconds"],
    ("episodes_per_step", "flops_per_token"),
)
_DEFAULTS: dict[str, Any] = {
    "status": "COMPLETE",
    "confirm": False,
    "alpha": 32.0,
    "lr": 1e-3,
    "rank": 8,
    "targets": "all-linear",
    "batch_size": 128,
    "budget": "32 steps",
    "context": "one",
    "base": 0.3,
    "model_parameters": 750_000,
    "diverged": False,
    "step": 32,
    "seed": 0,
}


def made(
    trials: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]] = (),
    *,
    metric: str = "eval/accuracy",
    maximize: bool = True,
    sweep: bool = True,
    problems: int | None = None,
) -> Experiment:
    """An experiment of `trials` (rank, alpha, lr, targets, batch_size, seed, score, …: columns of
    `Tables.runs`).

    `steps` rows name their trial by `number`; trials with equal settings are one configuration.
    """
    known: dict[tuple[Any, ...], int] = {}
    table = []
    for number, trial in enumerate(trials):
        row = {**_DEFAULTS, **trial}
        settings = {dotted: row[name] for name, dotted in KEYS.items()} if sweep else {}
        row = {
            "directory": DIRECTORY,
            "run_dir": f"trials/{number:04d}" if sweep else ".",
            "number": number if sweep else None,
            "configuration": known.setdefault(tuple(settings.values()), len(known))
            if sweep
            else None,
            "metric": metric,
            "maximize": maximize,
            "full": row["rank"] == 0,
            "best": row.get("score"),
            "last": row.get("score"),
            "best_step": row["step"],
            "command": "python -m harness.run",
            "problems": problems,
            **row,
            **settings,
        }
        absent = {"alpha": None, "targets": None} if row["full"] else {}
        table.append({**dict.fromkeys((*columns.RUN_COLUMNS, *_RATES)), **row, **absent})
    logged = _steps(table, steps)
    runs = rows.with_totals(pd.DataFrame(table).drop(columns=_TOTALS), logged)
    source = {
        **dict.fromkeys(columns.SOURCE_COLUMNS),
        "directory": DIRECTORY,
        "name": "made",
        "status": "COMPLETE",
        "kind": "sweep" if sweep else "run",
        "metric": metric,
        "maximize": maximize,
        "recipe": "",
        "manifest": "{}",
        "problems": problems,
        "seeds": json.dumps(sorted({int(row["seed"]) for row in table if not row["confirm"]})),
    }
    samples = pd.DataFrame(columns=["directory", "run_dir", "step", "phase", "index"])
    return Experiment.of(Tables(runs, logged, samples, pd.DataFrame([source])))


def svg_of(draw: Draw, look: Look) -> str:
    """A drawing as the text of its SVG."""
    return render(draw, look, png=False).svg.decode()


def _steps(table: list[dict[str, Any]], steps: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    identity = {
        row["number"]: {name: row[name] for name in (*columns.KEY, *columns.IDENTITY)}
        for row in table
    }
    filled = [{**identity[step.get("number")], **step} for step in steps]
    names = None if filled else [*columns.KEY, *columns.IDENTITY, "step"]
    found = pd.DataFrame(filled, columns=names)
    for name in columns.COSTS:
        found[name] = found.get(name, math.nan)
    return found.astype(dict.fromkeys(("number", "configuration", "seed", "step"), "Int64"))
