"""Compare runs and sweeps with undisturbed ones, to the bit.

Timings, times and names are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from harness.config.metrics import without_timings
from harness.records.files import SUMS, damage
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir

# Files with times, paths or output of one process. Where it matters, their content is compared.
_READ = ("log.txt", "manifest.json", "recipe.yaml", "metrics.jsonl", "state.json", SUMS)


def rows(run: RunDir) -> list[dict[str, float]]:
    """Return the log without what differs between two equal runs."""
    return [without_timings(row) for row in MetricsFile(run.metrics).rows()]


def lost_steps(expected: RunDir, actual: RunDir) -> int:
    """Count the steps whose row is missing or different."""
    actual_rows = {row["step"]: row for row in rows(actual)}
    return sum(actual_rows.get(row["step"]) != row for row in rows(expected))


def differences(expected: RunDir, actual: RunDir) -> list[str]:
    """Return the differences between two runs.

    Files in set_aside/ are ignored, but leftovers of a kill are not.
    """
    differ = [
        f"{name}: only in one" for name in sorted(_files(expected).keys() ^ _files(actual).keys())
    ]
    for name in sorted(_files(expected).keys() & _files(actual).keys()):
        one, two = _files(expected)[name], _files(actual)[name]
        if one.name not in _READ and one.read_bytes() != two.read_bytes():
            differ.append(f"{name}: other content")
        if one.name == SUMS and damage(two.parent) is not None:
            differ.append(f"{name}: {damage(two.parent)}")
        if one.name == "state.json" and _without_metrics(one) != _without_metrics(two):
            differ.append(f"{name}: {_without_metrics(two)}")
    if rows(expected) != rows(actual):
        differ.append("metrics.jsonl: other rows")
    manifests = [_outcome(run.read_manifest()) for run in (expected, actual)]
    return differ if manifests[0] == manifests[1] else [*differ, f"manifest.json: {manifests[1]}"]


def sweep_differences(expected: RunDir, actual: RunDir) -> list[str]:
    """Return the differences between two sweeps.

    Compared are studies, trials, tables, results and the names of their files.
    """
    differ = [
        f"{name}: only in one" for name in sorted(_files(expected).keys() ^ _files(actual).keys())
    ]
    if study(expected) != study(actual):
        differ.append(f"study.journal: {study(actual)}")
    for number in range(len(study(expected))):
        differ += [
            f"trial {number}: {one}"
            for one in differences(expected.trial(number), actual.trial(number))
        ]
    if _table(expected) != _table(actual):
        differ.append("results.csv: other rows")
    manifests = [_outcome(sweep.read_manifest()) for sweep in (expected, actual)]
    return differ if manifests[0] == manifests[1] else [*differ, f"manifest.json: {manifests[1]}"]


def study(sweep: RunDir) -> list[dict[str, Any]]:
    """Return the trials of a sweep's study without times, read with Optuna's journal backend."""
    storage = JournalStorage(JournalFileBackend(str(sweep.journal)))
    return [
        {
            "state": trial.state.name,
            "values": trial.values,
            "params": trial.params,
            "attributes": trial.user_attrs,
            "evaluations": trial.intermediate_values,
        }
        for trial in optuna.load_study(study_name=None, storage=storage).trials
    ]


def digests(directory: Path) -> dict[str, bytes | None]:
    """Return the content of every path below a directory, None for folders."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def _files(run: RunDir) -> dict[str, Path]:
    files = [
        path for path in run.path.rglob("*") if path.is_file() and run.aside not in path.parents
    ]
    return {str(path.relative_to(run.path)): path for path in files}


def _table(sweep: RunDir) -> str:
    table = pd.read_csv(sweep.results.with_suffix(".csv"))
    return str(table.drop(columns=[name for name in table.columns if "seconds" in name]).to_csv())


def _without_metrics(state: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads(state.read_text()).items() if key != "metrics"}


def _outcome(manifest: dict[str, Any]) -> dict[str, Any]:
    result = {key: value for key, value in (manifest["result"] or {}).items() if key != "seconds"}
    return {
        "status": manifest["status"],
        "digest": manifest["recipe"]["digest"],
        "result": result,
        "expect": manifest.get("expect"),
    }
