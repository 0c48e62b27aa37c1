"""A sweep's plan and its next configuration, a pure function of the plan and the results so far."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial

from harness.config import metrics
from harness.config import recipe as recipes
from harness.config.schema import Recipe, Sampler, Sweep
from harness.config.validate import check
from harness.core.errors import UserError, nearest
from rltrain.data.files import count_rows
from rltrain.models import adapter_start
from rltrain.models.adapter_files import KEY
from rltrain.tools.preflight import check_batch
from sweeps.study.pruner import build_pruner
from sweeps.study.space import Params, Space, from_recipe, identity, show

# A sampler may suggest what was tried already or what the recipe refuses: how often it is asked.
ATTEMPTS = 20

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known of one configuration, over all its seeds."""

    params: Params
    state: TrialState = TrialState.RUNNING
    value: float | None = None
    intermediate: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A sweep's space and settings, validated."""

    recipe: Recipe
    space: Space
    first_trials: tuple[Params, ...]
    _refusals: dict[str, UserError | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sweep(self) -> Sweep:
        """The recipe's sweep block."""
        assert self.recipe.sweep is not None
        return self.recipe.sweep

    @property
    def direction(self) -> metrics.Direction:
        """Whether the sweep maximizes or minimizes its metric."""
        return metrics.direction(self.sweep.metric)

    @property
    def num_configurations(self) -> int:
        """The configurations to try: `sweep.num_trials`, or the whole space if that is smaller."""
        size = self.space.size
        return self.sweep.num_trials if size is None else min(self.sweep.num_trials, size)

    @property
    def num_runs(self) -> int:
        """The runs of the sweep: each configuration once per seed."""
        return self.num_configurations * len(self.sweep.seeds)

    @property
    def adapters(self) -> list[str]:
        """The adapters that trials start from, where the sweep varies them."""
        axis = next((axis for axis in self.space.axes if axis.key == KEY), None)
        return [path for path in (axis.values() if axis else None) or () if path is not None]

    @property
    def fresh_seeds(self) -> range:
        """Seeds for confirmation runs: as many as the sweep has, but at least two for an interval.

        No other trial has them.
        """
        first = max(self.sweep.seeds) + 1
        return range(first, first + max(2, len(self.sweep.seeds)))

    @property
    def num_random(self) -> int:
        """Configurations that TPE samples at random before it learns from results.

        Optuna's 10 would be most of a small sweep.
        """
        return min(10, max(2, self.num_configurations // 3))

    def refusal(self, params: Params) -> UserError | None:
        """Return why the recipe refuses a configuration; None where it accepts it.

        Each value alone is valid. This checks the rules between keys.
        """
        key = identity(params)
        if key not in self._refusals:
            recipe = copy.deepcopy(self.recipe)
            recipe.sweep = None
            for name, value in params.items():
                group, _, leaf = name.rpartition(".")
                parent = recipes.get(recipe, group) if group else recipe
                old = getattr(parent, leaf)
                setattr(parent, leaf, type(old)[value] if isinstance(old, Enum) else value)
            try:
                check(recipe)
                if recipe.trainer.policy.model.lora.adapter_path is not None:
                    adapter_start.with_adapter(self.recipe, {"sweep": None, **params})
                self._refusals[key] = None
            except UserError as error:
                self._refusals[key] = error
        return self._refusals[key]


def build(recipe: Recipe) -> Plan:
    """Return the plan of a recipe's sweep.

    Raises UserError for a wrong space, metric, sampler, pruner or first trial.
    """
    space = from_recipe(recipe)
    plan = Plan(recipe, space, _first_trials(recipe, space))
    metrics.direction(plan.sweep.metric)  # raises for a metric that has none
    _, at, count = plan.sweep.metric.partition("@")
    if at and int(count) != recipe.generator.eval_n_samples_per_prompt:
        raise UserError(
            "sweep.metric needs as many samples a problem at evaluation",
            got=plan.sweep.metric,
            fix=f"generator.eval_n_samples_per_prompt={count}",
        )
    _check_batches(recipe, space)
    build_pruner(recipe)
    if plan.sweep.sampler is Sampler.grid and space.size is None:
        axis = next(axis for axis in space.axes if axis.values() is None)
        raise UserError(
            "a grid needs a list of values on each axis",
            got=f"{axis.key}: {axis.describe()}",
            fix="give choices or a step, or sweep.sampler=tpe",
        )
    for index, params in enumerate(plan.first_trials):
        refusal = plan.refusal(params) if len(params) == len(space.axes) else None
        if refusal is not None:
            raise UserError(
                f"sweep.first_trials[{index}]: {refusal.what}",
                got=refusal.got,
                allowed=refusal.allowed,
                fix=refusal.fix,
            )
    return plan


def _check_batches(recipe: Recipe, space: Space) -> None:
    """Raise UserError where training data that exists has fewer problems than the largest batch."""
    data, batch_size = (
        space[key].bounds() if key in space.distributions else (recipes.get(recipe, key),)
        for key in ("data.train_data", "trainer.train_batch_size")
    )
    for problems in map(count_rows, data):
        if problems is not None:
            check_batch(problems, max(batch_size))


def propose(plan: Plan, history: Sequence[Observation]) -> Params | None:
    """Return the configuration after those in `history`, None when no untried one is left.

    Raises UserError when the recipe refuses everything that the sampler suggests.
    """
    index = len(history)
    if index >= plan.num_configurations:
        return None
    tried = {identity(observation.params) for observation in history}
    # The sampler leaves the other first trials alone: each has its own turn.
    reserved = {
        identity(params)
        for i, params in enumerate(plan.first_trials)
        if i != index and len(params) == len(plan.space.axes)
    }
    first = plan.first_trials[index] if index < len(plan.first_trials) else {}
    for fixed in [first, {}] if first else [{}]:
        for params in _candidates(plan, history, fixed):
            if identity(params) not in tried | reserved and plan.refusal(params) is None:
                return params
    if plan.space.size is None:
        refusal = next((r for r in plan._refusals.values() if r is not None), None)
        raise UserError(
            "the recipe refuses every configuration the sampler suggests",
            got=refusal and refusal.what,
        )
    return None


def preview(plan: Plan, count: int) -> list[Params]:
    """Return the first `count` configurations, or as many of them as do not depend on results."""
    history: list[Observation] = []
    if plan.sweep.sampler is Sampler.tpe:
        complete = itertools.takewhile(
            lambda params: len(params) == len(plan.space.axes), plan.first_trials
        )
        count = min(count, max(plan.num_random, len(list(complete))))
    while len(history) < count and (params := propose(plan, history)) is not None:
        history.append(Observation(params))
    return [observation.params for observation in history]


def _candidates(plan: Plan, history: Sequence[Observation], fixed: Params) -> Iterator[Params]:
    """Yield what the sampler suggests with some axes fixed, then all of a finite space."""
    if plan.sweep.sampler is not Sampler.grid:
        for attempt in range(ATTEMPTS):
            yield _suggest(plan, history, fixed, attempt)
    size = plan.space.size
    if size is None:
        return
    # A part of a grid is shuffled: in order it would cover a corner only.
    order: Sequence[int] = range(size)
    if plan.num_configurations < size:
        order = random.Random(plan.recipe.seed).sample(order, size)
    for index in order:
        params = plan.space.point(index)
        if fixed.items() <= params.items():
            yield params


def _suggest(plan: Plan, history: Sequence[Observation], fixed: Params, attempt: int) -> Params:
    """Return a sampler's suggestion.

    The sampler's seed depends on the number of configurations so far, so that a resumed sweep does
    not repeat suggestions.
    """
    seed = int(
        np.random.SeedSequence([plan.recipe.seed, len(history), attempt]).generate_state(1)[0]
    )
    sampler: BaseSampler = RandomSampler(seed=seed)
    if plan.sweep.sampler is Sampler.tpe:
        sampler = TPESampler(seed=seed, n_startup_trials=plan.num_random)
    study = optuna.create_study(direction=plan.direction, sampler=sampler)
    space = plan.space
    study.add_trials(
        create_trial(
            state=observation.state,
            value=observation.value,
            params=space.encode_all(observation.params),
            distributions=dict(space.distributions),
            intermediate_values=observation.intermediate,
        )
        for observation in history
    )
    if fixed:
        study.enqueue_trial(space.encode_all(fixed))
    return space.decode_all(study.ask(dict(space.distributions)).params)


def _first_trials(recipe: Recipe, space: Space) -> tuple[Params, ...]:
    """Return `sweep.first_trials` with values of the axes' types.

    Raises UserError for keys that are no axis and values that an axis does not have. Optuna would
    accept them.
    """
    assert recipe.sweep is not None
    keys = [axis.key for axis in space.axes]
    first_trials: list[Params] = []
    for index, params in enumerate(recipe.sweep.first_trials):
        where = f"sweep.first_trials[{index}]"
        if not params:
            raise UserError(f"{where} names no axis", allowed=", ".join(keys))
        for key, value in params.items():
            if key not in keys:
                guess = nearest(key, keys)
                raise UserError(
                    f"{where} names a key that is no axis",
                    got=key,
                    allowed=", ".join(keys),
                    fix=f"did you mean {guess}?" if guess else None,
                )
            if not space[key].contains(value):
                raise UserError(
                    f"{where}: {key} is outside its axis",
                    got=show(value),
                    allowed=space[key].describe(),
                )
        converted = {
            axis.key: axis.convert(params[axis.key]) for axis in space.axes if axis.key in params
        }
        if converted in first_trials and len(converted) == len(keys):
            raise UserError(f"{where} repeats an earlier one", got=params)
        first_trials.append(converted)
    return tuple(first_trials)
