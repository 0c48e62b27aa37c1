"""What a sweep tries: which configuration comes next is a pure function of the plan and of what was
observed so far.
"""

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
from rltrain.tools.preflight import check_batch
from sweeps.study.pruner import build_pruner
from sweeps.study.space import Params, Space, from_recipe, identity, show

# How often a sampler is asked again for a configuration that was tried already or that the recipe
# refuses.
ATTEMPTS = 20

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known of one configuration, its seeds taken together."""

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
    _verdicts: dict[str, UserError | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sweep(self) -> Sweep:
        """The recipe's sweep block."""
        assert self.recipe.sweep is not None
        return self.recipe.sweep

    @property
    def direction(self) -> metrics.Direction:
        """Which way is better for the sweep's metric."""
        return metrics.direction(self.sweep.metric)

    @property
    def num_configurations(self) -> int:
        """`sweep.num_trials`, or the whole space where that is smaller."""
        size = self.space.size
        return self.sweep.num_trials if size is None else min(self.sweep.num_trials, size)

    @property
    def num_runs(self) -> int:
        """Configurations times seeds."""
        return self.num_configurations * len(self.sweep.seeds)

    @property
    def fresh_seeds(self) -> range:
        """Seeds that no trial of the sweep has, for those that confirm: as many, and at least two
        for an interval.
        """
        first = max(self.sweep.seeds) + 1
        return range(first, first + max(2, len(self.sweep.seeds)))

    @property
    def num_random(self) -> int:
        """Configurations that TPE draws at random: Optuna's 10 would leave a small sweep none to
        learn from.
        """
        return min(10, max(2, self.num_configurations // 3))

    def refusal(self, params: Params) -> UserError | None:
        """Why the recipe refuses a configuration; None when it takes it."""
        key = identity(params)
        if key not in self._verdicts:
            self._verdicts[key] = _refusal(self.recipe, params)
        return self._verdicts[key]


def _refusal(recipe: Recipe, params: Params) -> UserError | None:
    """Each value is one the recipe takes: what remains to check is the rules between keys."""
    trial = copy.deepcopy(recipe)
    trial.sweep = None
    for key, value in params.items():
        group, _, leaf = key.rpartition(".")
        parent = recipes.get(trial, group) if group else trial
        old = getattr(parent, leaf)
        setattr(parent, leaf, type(old)[value] if isinstance(old, Enum) else value)
    try:
        check(trial)
    except UserError as error:
        return error
    return None


def build(recipe: Recipe) -> Plan:
    """The plan of a recipe's sweep; raises UserError for a wrong space, metric, sampler, pruner or
    first trial.
    """
    space = from_recipe(recipe)
    plan = Plan(recipe, space, _first_trials(recipe, space))
    _check_metric(recipe, plan.sweep.metric)
    _check_batches(recipe, space)
    build_pruner(recipe)
    if plan.sweep.sampler is Sampler.grid and space.size is None:
        axis = next(axis for axis in space.axes if axis.values() is None)
        raise UserError(
            "a grid needs a list of values on each axis",
            got=f"{axis.key}: {axis.describe()}",
            fix="give choices or a step, or sweep.sampler=tpe",
        )
    for place, params in enumerate(plan.first_trials):
        refusal = plan.refusal(params) if len(params) == len(space.axes) else None
        if refusal is not None:
            raise UserError(
                f"sweep.first_trials[{place}]: {refusal.what}",
                got=refusal.got,
                allowed=refusal.allowed,
                fix=refusal.fix,
            )
    return plan


def _check_batches(recipe: Recipe, space: Space) -> None:
    """Every training file that is there must fill the largest batch: a trial that it does not fill
    would fail.
    """
    data, batch = (
        [recipes.get(recipe, key)] for key in ("data.train_data", "trainer.train_batch_size")
    )
    for axis in space.axes:
        data = list(axis.bounds()) if axis.key == "data.train_data" else data
        batch = list(axis.bounds()) if axis.key == "trainer.train_batch_size" else batch
    for problems in map(count_rows, data):
        if problems is not None:
            check_batch(problems, max(batch))


def _check_metric(recipe: Recipe, metric: str) -> None:
    """A metric must have a better end, and be one that the runs log."""
    metrics.direction(metric)
    _, at, count = metric.partition("@")
    if at and int(count) != recipe.generator.eval_n_samples_per_prompt:
        raise UserError(
            "sweep.metric needs as many samples a problem at evaluation",
            got=metric,
            fix=f"generator.eval_n_samples_per_prompt={count}",
        )


def propose(plan: Plan, history: Sequence[Observation]) -> Params | None:
    """The next configuration after those in `history`; None when all are proposed or nothing
    untried is left.

    Raises UserError when the recipe refuses everything that the sampler suggests.
    """
    place = len(history)
    if place >= plan.num_configurations:
        return None
    taken = {identity(seen.params) for seen in history}
    # A configuration that is to come first later on is not for the sampler to use up.
    taken |= {
        identity(p)
        for i, p in enumerate(plan.first_trials)
        if i != place and len(p) == len(plan.space.axes)
    }
    fixed = plan.first_trials[place] if place < len(plan.first_trials) else {}
    for wanted in [fixed, {}] if fixed else [{}]:
        for params in _candidates(plan, history, wanted):
            if identity(params) not in taken and plan.refusal(params) is None:
                return params
    if plan.space.size is None:
        refusal = next((r for r in plan._verdicts.values() if r is not None), None)
        raise UserError(
            "the recipe refuses every configuration the sampler suggests",
            got=refusal and refusal.what,
        )
    return None


def preview(plan: Plan, count: int) -> list[Params]:
    """The first `count` configurations, or as many of them as do not depend on results."""
    history: list[Observation] = []
    if plan.sweep.sampler is Sampler.tpe:
        given = itertools.takewhile(
            lambda params: len(params) == len(plan.space.axes), plan.first_trials
        )
        count = min(count, max(plan.num_random, len(list(given))))
    while len(history) < count and (params := propose(plan, history)) is not None:
        history.append(Observation(params))
    return [seen.params for seen in history]


def _candidates(plan: Plan, history: Sequence[Observation], fixed: Params) -> Iterator[Params]:
    """What the sampler suggests with some axes fixed, then, where the space is finite, everything
    there is.
    """
    if plan.sweep.sampler is not Sampler.grid:
        for attempt in range(ATTEMPTS):
            yield _suggest(plan, history, fixed, attempt)
    size = plan.space.size
    if size is None:
        return
    # A whole grid goes in order; a part of one goes shuffled, or it would cover a corner only.
    order: Sequence[int] = range(size)
    if plan.num_configurations < size:
        order = random.Random(plan.recipe.seed).sample(order, size)
    for index in order:
        params = plan.space.point(index)
        if fixed.items() <= params.items():
            yield params


def _suggest(plan: Plan, history: Sequence[Observation], fixed: Params, attempt: int) -> Params:
    """One suggestion of a sampler seeded by the recipe's seed and the place: a resumed sweep
    repeats none.
    """
    seed = int(
        np.random.SeedSequence([plan.recipe.seed, len(history), attempt]).generate_state(1)[0]
    )
    study = optuna.create_study(direction=plan.direction, sampler=_sampler(plan, seed))
    space = plan.space
    study.add_trials(
        create_trial(
            state=seen.state,
            value=seen.value,
            params=space.encode_all(seen.params),
            distributions=dict(space.distributions),
            intermediate_values=seen.intermediate,
        )
        for seen in history
    )
    if fixed:
        study.enqueue_trial(space.encode_all(fixed))
    return space.decode_all(study.ask(dict(space.distributions)).params)


def _sampler(plan: Plan, seed: int) -> BaseSampler:
    if plan.sweep.sampler is not Sampler.tpe:
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, n_startup_trials=plan.num_random)


def _first_trials(recipe: Recipe, space: Space) -> tuple[Params, ...]:
    """`sweep.first_trials` as the axes read them: Optuna itself would take any name and
    any value.
    """
    assert recipe.sweep is not None
    given = recipe.sweep.first_trials
    keys = [axis.key for axis in space.axes]
    first = []
    for place, params in enumerate(given):
        where = f"sweep.first_trials[{place}]"
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
            if not space[key].holds(value):
                raise UserError(
                    f"{where}: {key} is outside its axis",
                    got=show(value),
                    allowed=space[key].describe(),
                )
        normal = {
            axis.key: axis.normal(params[axis.key]) for axis in space.axes if axis.key in params
        }
        if normal in first and len(normal) == len(keys):
            raise UserError(f"{where} repeats an earlier one", got=params)
        first.append(normal)
    return tuple(first)
