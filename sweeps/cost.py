"""What a sweep will cost, before it runs: steps, samples, tokens, arithmetic, and time by earlier
runs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from harness.config import recipe as recipes
from harness.config.schema import Device, Recipe
from harness.config.shapes import flops_per_token, shape_of, training_flops
from harness.core.errors import UserError
from harness.core.paths import locate
from rltrain.data.files import count_rows
from sweeps.study.plan import Plan
from sweeps.study.space import Params

# Keys that a run's cost depends on, besides the data.
COST_KEYS = frozenset(
    {
        "trainer.train_batch_size",
        "trainer.max_steps",
        "trainer.epochs",
        "trainer.eval_interval",
        "trainer.eval_before_train",
        "trainer.algorithm.use_kl_loss",
        "trainer.algorithm.use_kl_in_reward",
        "trainer.algorithm.advantage_estimator",
        "trainer.update_epochs_per_batch",
        "trainer.policy_mini_batch_size",
        "trainer.policy.model.lora.dropout",
        "trainer.critic.model.lora.rank",
        "trainer.policy.model.path",
        "trainer.policy.model.lora.rank",
        "generator.n_samples_per_prompt",
        "generator.eval_n_samples_per_prompt",
        "generator.max_input_length",
        "generator.sampling_params.max_generate_length",
        "generator.eval_sampling_params.max_generate_length",
    }
)
# Billions of parameters in a model's name; after an A those that are active for a token.
_IN_NAME = re.compile(r"(?<![\d.])(A?)(\d+(?:\.\d+)?)[bB](?![a-zA-Z])")


@dataclass(frozen=True, slots=True)
class Cost:
    """One run's cost. Token counts are upper bounds: every prompt and completion as long as it may
    be.

    `evaluation_samples` is None, and evaluations are not counted, while the held-out data is not
    there.
    """

    steps: int
    training_samples: int
    evaluation_samples: int | None
    tokens: int
    flops: float | None


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds a step takes, evaluations included: the median of earlier runs of the same recipe."""

    seconds_per_step: float
    num_runs: int


def costs(plan: Plan) -> list[Cost]:
    """The cheapest and the dearest run of a sweep, one cost when these are equal; empty where
    `run_cost` has none.
    """
    if run_cost(plan.recipe) is None:
        return []
    base = recipes.with_values(plan.recipe, {"sweep": None})
    found: list[Cost] = []
    for values in _points(plan):
        try:
            found += [
                one
                for one in [run_cost(recipes.with_values(base, values) if values else base)]
                if one
            ]
        except UserError:
            continue  # a corner of the space that the recipe refuses is no trial either
    found.sort(key=lambda one: (one.tokens, one.steps, one.flops or 0.0))
    ends = [found[0], found[-1]] if found else []
    return ends[:1] if ends and ends[0] == ends[1] else ends


def _points(plan: Plan) -> list[Params]:
    """What to reckon the cost of: all configurations where the recipe gives them all, else the
    corners of the space.
    """
    axes = [axis for axis in plan.space.axes if axis.key in COST_KEYS]
    whole = [params for params in plan.first_trials if len(params) == len(plan.space.axes)]
    if len(whole) >= plan.num_configurations:
        given = whole[: plan.num_configurations]
        return list({tuple(params[axis.key] for axis in axes): params for params in given}.values())
    corners = itertools.product(*({axis.bounds()[0], axis.bounds()[-1]} for axis in axes))
    return [
        {axis.key: value for axis, value in zip(axes, corner, strict=True)} for corner in corners
    ]


def run_cost(recipe: Recipe) -> Cost | None:
    """One run's cost; None where training data is missing whose size decides on the number of
    steps.
    """
    num_train, num_val = (
        count_rows(paths) for paths in (recipe.data.train_data, recipe.data.val_data)
    )
    return (
        None
        if num_train is None and recipe.trainer.max_steps is None
        else cost(recipe, num_train, num_val)
    )


def cost(recipe: Recipe, num_train: int | None, num_val: int | None) -> Cost:
    """One run's cost, from the numbers of its training and evaluation problems; None: not known."""
    trainer, generator = recipe.trainer, recipe.generator
    steps = trainer.max_steps or trainer.epochs * ((num_train or 0) // trainer.train_batch_size)
    training = steps * trainer.train_batch_size * generator.n_samples_per_prompt
    times = math.ceil(steps / trainer.eval_interval) if trainer.eval_interval else 1
    evaluation = (
        (times + trainer.eval_before_train) * (num_val or 0) * generator.eval_n_samples_per_prompt
    )
    trained = training * (
        generator.max_input_length + generator.sampling_params.max_generate_length
    )
    evaluated = evaluation * (
        generator.max_input_length + generator.eval_sampling_params.max_generate_length
    )
    counted = None if num_val is None else evaluation
    return Cost(steps, training, counted, trained + evaluated, _flops(recipe, trained, evaluated))


def pace(plan: Plan, source: str) -> Pace | None:
    """How fast earlier runs and trials of the same recipe file were; None when there are none."""
    root = Path(plan.recipe.trainer.ckpt_path)
    paces = []
    if not os.path.isdir(root):
        return None
    for file in [*root.glob("*/manifest.json"), *root.glob("*/trials/*/manifest.json")]:
        # Any folder may lie there, and any file: what is no finished run of this recipe is passed
        # over.
        with contextlib.suppress(
            OSError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError
        ):
            record = json.loads(file.read_text())
            same = Path(record["recipe"]["source"]).stem == Path(source).stem
            if same and record["status"] == "COMPLETE":
                paces.append(float(record["result"]["seconds"] / record["result"]["step"]))
    return Pace(statistics.median(paces), len(paces)) if paces else None


def _flops(recipe: Recipe, trained: int, evaluated: int) -> float | None:
    """Return model FLOPs of a run on a GPU; None on a CPU or for a model of unknown size."""
    parameters = _parameters(recipe.trainer.policy.model.path)
    if parameters is None or recipe.trainer.placement.device is Device.cpu:
        return None
    sampling = training_flops(parameters, forwards=1, updates=0, full=False)
    return flops_per_token(recipe, parameters) * trained + sampling * evaluated


def _parameters(path: str) -> float | None:
    """Return a model's parameters by its sizes, else by a hub name like My-0.5B or My-30B-A3B.

    Of a mixture of experts these are the active parameters.
    """
    shape = shape_of(path)
    if shape is not None:
        return float(shape.parameters)
    names = _IN_NAME.findall(path) if locate(path) is None else []
    return float(next((n for active, n in names if active), names[0][1])) * 1e9 if names else None
