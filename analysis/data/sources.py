"""Describe a run or sweep directory as one row, from which its page can be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from analysis.data.records import Record, parse_recipe, recipe_text, times_of
from harness.config import metrics
from harness.core.paths import locate, shown
from harness.records.manifest import digest_path
from harness.records.run_dir import RunDir

DEFAULT_METRIC = "eval/accuracy"
DATA_FILES = (".parquet", ".jsonl", ".json")


def source_row(directory: Path, manifest: dict[str, Any], records: list[Record]) -> dict[str, Any]:
    """Return a directory's row: name, kind, status, times, metric, seeds, problems and its texts.

    `problems` counts the held-out problems; `manifest` is JSON and `recipe` YAML.
    """
    text = recipe_text(RunDir(directory))
    recipe = parse_recipe(text)
    is_sweep = manifest.get("kind") == "sweep"
    status, reason = manifest.get("status"), manifest.get("reason")
    seeds = sorted({record.seed for record in records if record.seed is not None})
    if is_sweep:
        swept = recipe.get("sweep")
        sweep = swept if isinstance(swept, dict) else {}
        metric = str(sweep.get("metric", DEFAULT_METRIC))
        named = sweep.get("seeds")
        if isinstance(named, list) and all(isinstance(seed, int) for seed in named):
            seeds = named or seeds
    else:
        # A damaged manifest is not used; the record's is empty then.
        manifest, status, reason = records[0].manifest, records[0].status, records[0].reason
        rows = records[0].rows
        evaluated = not rows or any(DEFAULT_METRIC in row for row in rows)
        metric = DEFAULT_METRIC if evaluated else "reward"
    return {
        "directory": shown(directory),
        "name": str(manifest.get("name") or directory.name),
        "kind": "sweep" if is_sweep else "run",
        "metric": metric,
        "seeds": json.dumps(seeds),
        "recipe": text,
        "maximize": metrics.direction(metric) == "maximize",
        "problems": _num_problems(manifest, recipe, records),
        **of_manifest(manifest),
        "status": status,
        "reason": reason,
    }


def of_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a directory's row that change when it ends."""
    seconds = manifest.get("seconds")
    return {
        "manifest": json.dumps(manifest),
        "status": manifest.get("status"),
        "reason": manifest.get("reason"),
        "seconds": seconds if isinstance(seconds, int | float) else None,
        **times_of(manifest),
    }


def _num_problems(
    manifest: dict[str, Any], recipe: dict[str, Any], records: list[Record]
) -> int | None:
    """Return the held-out problems of every run: as logged, else as the data files hold.

    None where runs differ, or where a data file is gone or has changed.
    """
    logged = {record.num_problems for record in records if record.num_problems is not None}
    if logged:
        return logged.pop() if len(logged) == 1 else None
    recorded = manifest.get("data") or {}
    names = (recipe.get("data") or {}).get("val_data") or []
    counts = [_count_rows(name, recorded.get(name)) for name in names if isinstance(name, str)]
    known = [count for count in counts if count is not None]
    return sum(known) or None if len(known) == len(names) else None


def _count_rows(name: str, digest: str | None) -> int | None:
    """Count the rows of a data file; None when it is gone or no longer has the recorded digest.

    A run directory may name any file, so devices and pipes are never opened.
    """
    file = locate(name)
    if file is None or not digest or not file.is_file() or file.suffix not in DATA_FILES:
        return None
    if digest_path(name) != digest:
        return None
    if file.suffix == ".parquet":
        return int(pq.read_metadata(file).num_rows)
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
