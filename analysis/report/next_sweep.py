"""The command of a small sweep that would settle what a sweep or a run left open."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.data.rows import param_columns
from analysis.experiment import Experiment
from harness.config import recipe as recipes

NAME = "trainer.run_name"


def command(
    experiment: Experiment, row: pd.Series, space: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> str:
    """`python -m harness.sweep ...` over a grid of `space`, all else as in a run's `row`, quoted
    for a shell.
    """
    source, given = _written(experiment)
    swept = param_columns(experiment.tables.runs)
    fixed = {key: _plain(row[key]) for key in swept if key not in space and pd.notna(row[key])}
    set_here = {*fixed, *space}
    kept = [
        one
        for one in given
        if (key := one.partition("=")[0]) not in set_here and not key.startswith("sweep.")
    ]
    axes = [f"{key}:{_axis(values, _range_of(experiment, key))}" for key, values in space.items()]
    gone = [f"{key}:null" for key in fixed]
    count = math.prod(len(values) for values in space.values())
    own = [
        f"sweep.space={{{','.join([*axes, *gone])}}}",
        _seeds(seeds),
        "sweep.sampler=grid",
        f"sweep.num_trials={count}",
        "sweep.first_trials=[]",
        "sweep.pruner=null",
    ]
    overrides = [recipes.override_for(key, value) for key, value in fixed.items()]
    return shlex.join(["python", "-m", "harness.sweep", source, *kept, *overrides, *own])


def again(experiment: Experiment, seeds: Sequence[int]) -> str:
    """The command that runs the same sweep on these seeds."""
    source, given = _written(experiment)
    kept = [one for one in given if not one.startswith("sweep.seeds=")]
    return shlex.join(["python", "-m", "harness.sweep", source, *kept, _seeds(seeds)])


def confirm(experiment: Experiment, count: int) -> str:
    """The command that runs a sweep's best configurations again on fresh seeds."""
    return shlex.join(
        ["python", "-m", "harness.sweep", "--resume", experiment.directory, "--confirm", str(count)]
    )


def _written(experiment: Experiment) -> tuple[str, list[str]]:
    """The recipe file and the overrides that an experiment was started with, but for its name:
    another's now.
    """
    written = experiment.manifest.get("recipe") or {}
    source = str(written.get("source") or f"{experiment.directory}/recipe.yaml")
    given = [
        str(one) for one in written.get("overrides") or [] if not str(one).startswith(f"{NAME}=")
    ]
    named = (experiment.recipe.get("trainer") or {}).get("run_name")
    return source, [*given, f"{NAME}=null"] if named else given


def _seeds(seeds: Sequence[int]) -> str:
    return f"sweep.seeds={json.dumps(list(seeds), separators=(',', ':'))}"


def _range_of(experiment: Experiment, key: str) -> list[str]:
    """The fields by which a sweep's recipe gives a range for a key."""
    spec = ((experiment.recipe.get("sweep") or {}).get("space") or {}).get(key) or {}
    return [name for name in ("low", "high", "log", "step") if name in spec]


def _axis(values: Sequence[Any], instead_of: Sequence[str]) -> str:
    """Choices in Hydra's grammar; what a range said of the same key is taken out."""
    choices = recipes.override_for("choices", [_plain(value) for value in values]).replace(
        "=", ":", 1
    )
    return f"{{{','.join([choices, *(f'{name}:null' for name in instead_of)])}}}"


def _plain(value: Any) -> Any:
    """A table's value as a recipe's: numbers plain, lists from their JSON text."""
    if isinstance(value, str):
        return json.loads(value) if value.startswith("[") else value
    number = float(value)
    return int(number) if number.is_integer() else number
