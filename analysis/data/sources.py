"""What a run or sweep directory is as a whole: the row of `Tables.sources`, from which a page can
be made again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from analysis.data.records import Record, parsed_recipe, recipe_text, times_of
from harness.config import metrics
from harness.core.paths import locate, shown
from harness.records.manifest import digest_path
from harness.records.run_dir import RunDir

DEFAULT_METRIC = "eval/accuracy"
DATA_FILES = (".parquet", ".jsonl", ".json")
# The columns of `Tables.sources`.
WORDS = ("directory", "name", "kind", "status", "reason", "metric", "seeds", "manifest", "recipe")
REAL = ("seconds", "created", "started", "ended")
COLUMNS = (*WORDS, "maximize", "problems", *REAL)


def source_row(directory: Path, manifest: dict[str, Any], records: list[Record]) -> dict[str, Any]:
    """A directory's name, kind, status, times, metric, seeds, held-out problems, manifest (JSON)
    and recipe (YAML).
    """
    run = RunDir(directory)
    text = recipe_text(run)
    recipe = parsed_recipe(text)
    sweep = manifest.get("kind") == "sweep"
    status, reason = manifest.get("status"), manifest.get("reason")
    if not sweep:
        # Of a damaged manifest nothing is used.
        manifest, status, reason = records[0].manifest, records[0].status, records[0].reason
    metric = _swept_metric(recipe) if sweep else _logged_metric(records[0])
    seeds = _seeds(recipe) if sweep else None
    seconds = manifest.get("seconds")
    return {
        "directory": shown(directory),
        "name": str(manifest.get("name") or directory.name),
        "kind": "sweep" if sweep else "run",
        "status": status,
        "reason": reason,
        "metric": metric,
        "seeds": json.dumps(
            seeds or sorted({record.seed for record in records if record.seed is not None})
        ),
        "manifest": json.dumps(manifest),
        "recipe": text,
        "maximize": metrics.direction(metric) == "maximize",
        "problems": _problems(manifest, recipe, records),
        "seconds": seconds if isinstance(seconds, int | float) else None,
        **times_of(manifest),
    }


def _swept_metric(recipe: dict[str, Any]) -> str:
    sweep = recipe.get("sweep")
    return str(sweep["metric"]) if isinstance(sweep, dict) and "metric" in sweep else DEFAULT_METRIC


def _logged_metric(record: Record) -> str:
    rows = record.rows
    return DEFAULT_METRIC if not rows or any(DEFAULT_METRIC in row for row in rows) else "reward"


def _seeds(recipe: dict[str, Any]) -> list[int] | None:
    """The seeds that a sweep's recipe names; None where it names none, or nonsense."""
    sweep = recipe.get("sweep")
    seeds = sweep.get("seeds") if isinstance(sweep, dict) else None
    return (
        seeds if isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds) else None
    )


def _problems(
    manifest: dict[str, Any], recipe: dict[str, Any], records: list[Record]
) -> int | None:
    """Held-out problems of every run: as logged, else as many as the data files hold; None where
    runs differ.
    """
    logged = {number for record in records if (number := problems_of(record)) is not None}
    if logged:
        return logged.pop() if len(logged) == 1 else None
    return _counted(manifest, recipe)


def problems_of(record: Record) -> int | None:
    """The held-out problems a run's evaluations asked, as it logged them; None where it did not."""
    name = "eval/num_problems"
    logged = [row[name] for row in record.rows if name in row and row[name] == row[name]]
    return int(logged[-1]) if logged else None


def _counted(manifest: dict[str, Any], recipe: dict[str, Any]) -> int | None:
    """Held-out problems counted in the very files the run used; None where one is gone or has
    changed.
    """
    names = (recipe.get("data") or {}).get("val_data") or []
    counts = [_rows(name, manifest) for name in names]
    return (
        sum(count for count in counts if count is not None) or None if None not in counts else None
    )


def _rows(name: str, manifest: dict[str, Any]) -> int | None:
    """Rows of a data file that still is the one the manifest names; None when it is gone or has
    changed.

    The name is the run directory's: any other file, a device or a pipe is not opened for it.
    """
    found, recorded = (
        locate(name) if isinstance(name, str) else None,
        (manifest.get("data") or {}).get(name),
    )
    if found is None or not recorded or not found.is_file() or found.suffix not in DATA_FILES:
        return None
    if digest_path(name) != recorded:
        return None
    if found.suffix == ".parquet":
        return int(pq.read_metadata(found).num_rows)
    with found.open("rb") as file:
        return sum(1 for line in file if line.strip())
