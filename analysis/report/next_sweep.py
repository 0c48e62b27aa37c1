"""Write the command of a small sweep that would settle an open question."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.data.columns import param_columns
from analysis.data.records import lookup
from analysis.experiment import Experiment
from harness.config import recipe as recipes

NAME = "trainer.run_name"
_PROGRAM = ("python", "-m", "harness.sweep")


def grid_sweep(
    experiment: Experiment, row: pd.Series, space: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> str:
    """Return the command of a grid over `space`, all else as in a run's `row`."""
    source, overrides = _recipe(experiment)
    swept = param_columns(experiment.tables.runs)
    fixed = {key: _plain(row[key]) for key in swept if key not in space and pd.notna(row[key])}
    kept = []
    for override in overrides:
        key = override.partition("=")[0]
        if key not in fixed and key not in space and not key.startswith("sweep."):
            kept.append(override)
    ranges = (experiment.recipe.get("sweep") or {}).get("space") or {}
    axes = []
    for key, values in space.items():
        choices = recipes.override_for("choices", [_plain(value) for value in values])
        # A range that the recipe gives for the same key has to go.
        fields = [
            name for name in ("low", "high", "log", "step") if name in (ranges.get(key) or {})
        ]
        parts = [choices.replace("=", ":", 1), *(f"{name}:null" for name in fields)]
        axes.append(f"{key}:{{{','.join(parts)}}}")
    axes += [f"{key}:null" for key in fixed]
    sweep = [
        f"sweep.space={{{','.join(axes)}}}",
        _seeds(seeds),
        "sweep.sampler=grid",
        f"sweep.num_trials={math.prod(len(values) for values in space.values())}",
        "sweep.first_trials=[]",
        "sweep.pruner=null",
    ]
    kept += [recipes.override_for(key, value) for key, value in fixed.items()]
    return shlex.join([*_PROGRAM, source, *kept, *sweep])


def again(experiment: Experiment, seeds: Sequence[int]) -> str:
    """Return the command that runs the same sweep on these seeds."""
    source, overrides = _recipe(experiment)
    kept = [override for override in overrides if not override.startswith("sweep.seeds=")]
    return shlex.join([*_PROGRAM, source, *kept, _seeds(seeds)])


def confirm(experiment: Experiment, count: int) -> str:
    """Return the command that runs a sweep's best configurations again on fresh seeds."""
    return shlex.join([*_PROGRAM, "--resume", experiment.directory, "--confirm", str(count)])


def _recipe(experiment: Experiment) -> tuple[str, list[str]]:
    """Return the recipe file and overrides of an experiment, without its own name."""
    recorded = experiment.manifest.get("recipe") or {}
    source = str(recorded.get("source") or f"{experiment.directory}/recipe.yaml")
    overrides = [str(override) for override in recorded.get("overrides") or []]
    kept = [override for override in overrides if not override.startswith(f"{NAME}=")]
    return source, [*kept, f"{NAME}=null"] if lookup(experiment.recipe, NAME) else kept


def _seeds(seeds: Sequence[int]) -> str:
    return f"sweep.seeds={json.dumps(list(seeds), separators=(',', ':'))}"


def _plain(value: Any) -> Any:
    """Return a table's value as a recipe's: numbers plain, lists from their JSON text."""
    if isinstance(value, str):
        return json.loads(value) if value.startswith("[") else value
    number = float(value)
    return int(number) if number.is_integer() else number


def more_seeds(experiment: Experiment, count: int) -> list[int]:
    """Return at least `count` seeds, those of the sweep first."""
    used = experiment.seeds
    fresh = [seed for seed in range(count + len(used)) if seed not in used]
    return [*used, *fresh][: max(count, len(used))]
