"""The cost of a run or a sweep, before it runs: steps, samples, tokens, FLOPs and time."""

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
# Billions of parameters in a model's name; after an A the ones active for a token.
_IN_NAME = re.compile(r"(?<![\d.])(A?)(\d+(?:\.\d+)?)[bB](?![a-zA-Z])")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one run.

    Attributes:
        steps: training steps.
        training_samples: completions sampled to train on.
        evaluation_samples: completions sampled in evaluations; None, and not in the other numbers,
            while the evaluation data is missing.
        tokens: an upper bound: every prompt and completion has its greatest length.
        flops: model FLOPs for these tokens; None on a CPU or for a model of unknown size.
    """

    steps: int
    training_samples: int
    evaluation_samples: int | None
    tokens: int
    flops: float | None


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds per step, evaluations included: the median over earlier runs of the same recipe."""

    seconds_per_step: float
    num_runs: int


def costs(plan: Plan) -> list[Cost]:
    """Return the costs of a sweep's cheapest and most expensive run, one cost where they are equal.

    Empty where `run_cost` is None.
    """
    if run_cost(plan.recipe) is None:
        return []
    base = recipes.with_values(plan.recipe, {"sweep": None})
    all_costs: list[Cost] = []
    for params in _configurations(plan):
        # The recipe may refuse a corner of the space: then it is no trial either.
        with contextlib.suppress(UserError):
            cost = run_cost(recipes.with_values(base, params) if params else base)
            all_costs += [] if cost is None else [cost]
    all_costs.sort(key=lambda cost: (cost.tokens, cost.steps, cost.flops or 0.0))
    extremes = [all_costs[0], all_costs[-1]] if all_costs else []
    return extremes[:1] if extremes and extremes[0] == extremes[1] else extremes


def _configurations(plan: Plan) -> list[Params]:
    """Return the configurations to compute the cost of.

    They are the recipe's first trials where these are the whole sweep, else the corners of the
    space.
    """
    axes = [axis for axis in plan.space.axes if axis.key in COST_KEYS]
    complete = [params for params in plan.first_trials if len(params) == len(plan.space.axes)]
    if len(complete) >= plan.num_configurations:
        by_cost_keys = {
            tuple(params[axis.key] for axis in axes): params
            for params in complete[: plan.num_configurations]
        }
        return list(by_cost_keys.values())
    corners = itertools.product(*({axis.bounds()[0], axis.bounds()[-1]} for axis in axes))
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, corner, strict=True)) for corner in corners]


def run_cost(recipe: Recipe) -> Cost | None:
    """Return one run's cost.

    None where the number of steps depends on training data that is missing.
    """
    trainer, generator = recipe.trainer, recipe.generator
    num_train, num_val = count_rows(recipe.data.train_data), count_rows(recipe.data.val_data)
    if num_train is None and trainer.max_steps is None:
        return None
    steps = trainer.max_steps or trainer.epochs * ((num_train or 0) // trainer.train_batch_size)
    training = steps * trainer.train_batch_size * generator.n_samples_per_prompt
    evaluations = math.ceil(steps / trainer.eval_interval) if trainer.eval_interval else 1
    evaluations += trainer.eval_before_train
    evaluation = evaluations * (num_val or 0) * generator.eval_n_samples_per_prompt
    prompt_length = generator.max_input_length
    train_tokens = training * (prompt_length + generator.sampling_params.max_generate_length)
    eval_length = prompt_length + generator.eval_sampling_params.max_generate_length
    eval_tokens = evaluation * eval_length
    parameters, flops = _parameters(trainer.policy.model.path), None
    if parameters is not None and trainer.placement.device is not Device.cpu:
        sampling = training_flops(parameters, forwards=1, updates=0, full=False)
        flops = flops_per_token(recipe, parameters) * train_tokens + sampling * eval_tokens
    return Cost(
        steps,
        training,
        None if num_val is None else evaluation,
        train_tokens + eval_tokens,
        flops,
    )


def pace(plan: Plan, source: str) -> Pace | None:
    """Return how fast earlier runs and trials of the same recipe file were; None without any."""
    root = Path(plan.recipe.trainer.ckpt_path)
    paces = []
    if not os.path.isdir(root):
        return None
    for file in [*root.glob("*/manifest.json"), *root.glob("*/trials/*/manifest.json")]:
        # Users may keep other folders and files there: skip what is no finished run.
        with contextlib.suppress(
            OSError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError
        ):
            record = json.loads(file.read_text())
            same = Path(record["recipe"]["source"]).stem == Path(source).stem
            if same and record["status"] == "COMPLETE":
                paces.append(float(record["result"]["seconds"] / record["result"]["step"]))
    return Pace(statistics.median(paces), len(paces)) if paces else None


def _parameters(path: str) -> float | None:
    """Return a model's parameters by its sizes, else by a Hugging Face name like My-30B-A3B.

    Of a mixture of experts these are the active parameters.
    """
    shape = shape_of(path)
    if shape is not None:
        return float(shape.active_parameters)
    names = _IN_NAME.findall(path) if locate(path) is None else []
    return float(next((n for active, n in names if active), names[0][1])) * 1e9 if names else None
