"""A recipe's `sweep.space` as axes with Optuna distributions, checked against the recipe.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from harness.config import recipe as recipes
from harness.config.digest import PLACE_KEYS
from harness.config.recipe_keys import AXIS_FIELDS, axes_in, known_keys
from harness.config.schema import Recipe
from harness.core.errors import UserError
from rltrain.models.adapter_start import with_adapter
from rltrain.models.targets import check_modules, stored_modules
from sweeps.study import axes

Params = dict[str, Any]
Distribution = CategoricalDistribution | IntDistribution | FloatDistribution
FORMS = "{choices: [...]} or {low, high, log, step}"


@dataclass(frozen=True, slots=True)
class Axis:
    """A swept recipe key; its values are `choices`, or a range where `choices` is None."""

    key: str
    distribution: Distribution
    choices: tuple[Any, ...] | None = None

    @property
    def kind(self) -> str:
        """`choices`, `int` or `float`, with `, log` for a logarithmic scale."""
        if isinstance(self.distribution, CategoricalDistribution):
            return "choices"
        name = "int" if isinstance(self.distribution, IntDistribution) else "float"
        return f"{name}, log" if self.distribution.log else name

    def values(self) -> tuple[Any, ...] | None:
        """Return every value in order, or None for a continuous range."""
        span = self.distribution
        if isinstance(span, CategoricalDistribution):
            return self.choices
        if isinstance(span, IntDistribution):
            return tuple(range(span.low, span.high + 1, span.step))
        if span.step is not None:
            return tuple(
                span.low + i * span.step
                for i in range(round((span.high - span.low) / span.step) + 1)
            )
        return None

    def bounds(self) -> tuple[Any, ...]:
        """Return every choice, or the lowest and the highest value."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.choices or ()
        return (self.distribution.low, self.distribution.high)

    def contains(self, value: Any) -> bool:
        """Return whether the axis has a value."""
        span = self.distribution
        if isinstance(span, CategoricalDistribution):
            return encode(value) in span.choices
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not span.low <= value <= span.high
        ):
            return False
        if isinstance(span, IntDistribution) and value != int(value):
            return False
        steps = (value - span.low) / span.step if span.step is not None else 0
        return math.isclose(steps, round(steps), abs_tol=1e-9)

    def convert(self, value: Any) -> Any:
        """Return a value of the axis in the type of its key: 16 as 16.0 for a float."""
        if self.choices is not None:
            return next(choice for choice in self.choices if encode(choice) == encode(value))
        return int(value) if isinstance(self.distribution, IntDistribution) else float(value)

    def describe(self) -> str:
        """Return the choices or the range as text."""
        if self.choices is not None:
            return ", ".join(show(choice) for choice in self.choices)
        step = getattr(self.distribution, "step", None)
        tail = f", step {show(step)}" if step not in (None, 1) else ""
        return " to ".join(show(bound) for bound in self.bounds()) + tail


@dataclass(frozen=True, slots=True)
class Space:
    """The axes of a sweep.

    Parameters are plain values by dotted key. Optuna stores them as `encode_all` returns them.
    """

    axes: tuple[Axis, ...]

    @property
    def distributions(self) -> dict[str, Distribution]:
        """Optuna's distributions by key."""
        return {axis.key: axis.distribution for axis in self.axes}

    @property
    def size(self) -> int | None:
        """The number of configurations; None when an axis is continuous."""
        values = [axis.values() for axis in self.axes]
        return math.prod(len(v) for v in values if v is not None) if None not in values else None

    def __getitem__(self, key: str) -> Axis:
        return next(axis for axis in self.axes if axis.key == key)

    def point(self, index: int) -> Params:
        """Return a configuration of a finite space by its index; the last axis varies fastest."""
        params: Params = {}
        for axis in reversed(self.axes):
            values = axis.values() or ()
            index, value_index = divmod(index, len(values))
            params[axis.key] = values[value_index]
        return {axis.key: params[axis.key] for axis in self.axes}

    def encode_all(self, params: Params) -> Params:
        """Return parameters as Optuna stores them."""
        return {
            key: encode(value) if self[key].choices is not None else value
            for key, value in params.items()
        }

    def decode_all(self, params: Mapping[str, Any]) -> Params:
        """Return parameters that Optuna stored as the recipe has them, in the axes' order."""
        decoded: Params = {}
        for axis in self.axes:
            value = params[axis.key]
            if axis.choices is not None:
                value = next(choice for choice in axis.choices if encode(choice) == value)
            decoded[axis.key] = value
        return decoded

    @property
    def hash(self) -> str:
        """The SHA-256 of the space: a resumed sweep compares it."""
        exact = {axis.key: repr(axis.distribution) for axis in self.axes}
        return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()


def from_recipe(recipe: Recipe) -> Space:
    """Return the space of a recipe's sweep.

    Raises UserError, which names the axis, for anything wrong in it.
    """
    if recipe.sweep is None or not recipe.sweep.space:
        raise UserError(
            "the recipe sweeps nothing: sweep.space names no key",
            fix="add sweep.space, e.g. trainer.policy.model.lora.rank: {choices: [1, 8, 32]}",
        )
    specs = axes_in(recipe.sweep.space)
    plain = recipes.with_values(recipe, {"sweep": None})
    for key, spec in specs.items():
        _check_key(plain, key)
        axes.check_kind(key, recipe.sweep.metric)
        _check_form(key, spec)
    values = _values(plain, specs)
    axes.check_effect(values, plain)
    _check_modules(plain, values)
    return Space(tuple(_axis(key, specs[key], values[key]) for key in specs))


def encode(value: Any) -> Any:
    """Return a choice as Optuna can store it: lists as JSON text, scalars unchanged."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def show(value: Any) -> str:
    """Return a parameter's value as short text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ",".join(map(show, value)) + "]"
    return "null" if value is None else str(value)


def identity(params: Params) -> str:
    """Return text that is equal for equal configurations."""
    return json.dumps(params, sort_keys=True)


def short_names(keys: list[str]) -> dict[str, str]:
    """Return headings by key: the shortest dotted endings that are still different."""
    for length in range(1, max((key.count(".") for key in keys), default=0) + 2):
        names = {key: ".".join(key.split(".")[-length:]) for key in keys}
        if len(set(names.values())) == len(keys):
            return names
    return {key: key for key in keys}


def _check_key(plain: Recipe, key: str) -> None:
    example = "a recipe key such as trainer.policy.model.lora.rank"
    if key == "sweep" or key.startswith("sweep."):
        raise UserError("sweep.space: a sweep does not sweep itself", got=key, allowed=example)
    if key in ("seed", "trainer.seed"):
        raise UserError(
            "sweep.space: seeds are not an axis", got=key, fix="list them in sweep.seeds"
        )
    if key in PLACE_KEYS:
        raise UserError(
            "sweep.space: the sweep names its trials' directories itself", got=key, allowed=example
        )
    if key not in known_keys():
        if any(known.startswith(f"{key}.") for known in known_keys()):
            raise UserError(
                "sweep.space: this is a group of keys, not one key", got=key, allowed=example
            )
        try:
            recipes.with_values(plain, {key: None})
        except UserError as error:
            raise UserError("sweep.space names an unknown key", got=key, fix=error.fix) from None


def _check_modules(plain: Recipe, values: Mapping[str, Sequence[Any]]) -> None:
    """Raise UserError for target modules that the model does not have.

    Without this check, each trial would fail after its engine has started.
    """
    if {"trainer.policy.model.path", "trainer.critic.model.path"} & set(values):
        return  # the modules depend on the trial
    policy, critic = plain.trainer.policy, plain.trainer.critic
    for key in values:
        if key.endswith(("target_modules", "exclude_modules")):
            role = critic if key.startswith("trainer.critic.") else policy
            modules = stored_modules(role.model.path or policy.model.path)
            if modules is not None:
                for value in values[key]:
                    check_modules(f"sweep.space: {key}", value, modules)


def _check_form(key: str, spec: Any) -> None:
    if not isinstance(spec, Mapping):
        raise UserError(f"sweep.space: {key} is no axis", got=spec, allowed=FORMS)
    fields = {name for name, value in spec.items() if value is not None}
    unknown = set(spec) - set(AXIS_FIELDS)
    if unknown:
        raise UserError(
            f"sweep.space: {key} has an unknown field",
            got=", ".join(sorted(unknown)),
            allowed=FORMS,
        )
    has_choices, has_range = "choices" in fields, bool(fields & {"low", "high", "log", "step"})
    if has_choices == has_range:
        problem = (
            "has both choices and a range" if has_choices else "has neither choices nor a range"
        )
        raise UserError(f"sweep.space: {key} {problem}", got=dict(spec), allowed=FORMS)
    if has_range:
        _check_range(key, spec)
    elif not isinstance(spec["choices"], list) or not spec["choices"]:
        raise UserError(
            f"sweep.space: {key} has no choices",
            got=spec["choices"],
            allowed="choices: [A, B, ...]",
        )


def _check_range(key: str, spec: Mapping[str, Any]) -> None:
    for name in ("low", "high", "step"):
        value = spec.get(name)
        if name == "step" and value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise UserError(
                f"sweep.space: {key} needs a number for {name}", got=value, allowed=FORMS
            )
    low, high, step, log = spec["low"], spec["high"], spec.get("step"), spec.get("log")
    if log not in (None, True, False):
        raise UserError(f"sweep.space: {key}: log is true or false", got=log)
    if low >= high:
        raise UserError(
            f"sweep.space: {key}: low must be below high", got=f"low={low}, high={high}"
        )
    if log and low <= 0:
        raise UserError(f"sweep.space: {key}: a logarithmic range starts above 0", got=f"low={low}")
    if log and step is not None:
        raise UserError(
            f"sweep.space: {key}: a logarithmic range has no step",
            got=f"step={step}",
            fix="drop step",
        )
    if step is not None:
        steps = (high - low) / step if step > 0 else 0
        if step <= 0 or steps < 1 or not math.isclose(steps, round(steps), rel_tol=1e-9):
            got = f"low={low}, high={high}, step={step}"
            raise UserError(f"sweep.space: {key}: whole steps must lead from low to high", got=got)


def _values(plain: Recipe, specs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return each axis's choices or bounds in the types of the recipe's keys.

    Raises UserError for a value that the recipe refuses.
    """
    written = {key: _choices_or_bounds(spec) for key, spec in specs.items()}
    converted: dict[str, list[Any]] = {key: [] for key in written}
    for index in range(max(map(len, written.values()))):
        # One value of every axis at a time, because validating a recipe is slow.
        values = {key: axis[index] for key, axis in written.items() if index < len(axis)}
        try:
            accepted = _read_back(plain, values)
        except UserError:
            accepted = {key: _accepted(plain, key, v, specs) for key, v in values.items()}
        for key, value in accepted.items():
            converted[key].append(value)
    return converted


def _accepted(plain: Recipe, key: str, value: Any, specs: Mapping[str, Any]) -> Any:
    try:
        return _read_back(plain, {key: value})[key]
    except UserError as error:
        refusal = error
    # Keys may depend on each other, such as a batch and its mini-batch: a value is accepted if it
    # is valid with some value of another axis.
    for other, spec in specs.items():
        if other != key:
            for other_value in _choices_or_bounds(spec):
                with contextlib.suppress(UserError):
                    return _read_back(plain, {key: value, other: other_value})[key]
    raise UserError(
        f"sweep.space: {key} cannot be {show(value)}: {refusal.what}",
        got=refusal.got,
        allowed=refusal.allowed,
        fix=refusal.fix,
    )


def _axis(key: str, spec: Mapping[str, Any], values: list[Any]) -> Axis:
    if spec.get("choices") is not None:
        seen: set[str] = set()
        for value in values:
            if identity({"": value}) in seen:
                raise UserError(f"sweep.space: {key} has the same choice twice", got=show(value))
            seen.add(identity({"": value}))
        return Axis(key, CategoricalDistribution([encode(v) for v in values]), tuple(values))
    low, high = values
    if isinstance(low, bool) or not isinstance(low, int | float):
        raise UserError(
            f"sweep.space: {key} is no number, so has no range",
            got=dict(spec),
            allowed="choices: [...]",
        )
    log, step = bool(spec.get("log")), spec.get("step")
    if isinstance(low, int):
        if step is not None and step != int(step):
            raise UserError(
                f"sweep.space: {key} is a whole number, so its step is one", got=f"step={step}"
            )
        return Axis(key, IntDistribution(low, high, log=log, step=int(step or 1)))
    return Axis(key, FloatDistribution(low, high, log=log, step=step))


def _choices_or_bounds(spec: Mapping[str, Any]) -> list[Any]:
    return spec.get("choices") or [spec["low"], spec["high"]]


def _read_back(plain: Recipe, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as the recipe has them after it was validated with them."""
    accepted = recipes.to_dict(with_adapter(plain, values))
    return {key: functools.reduce(operator.getitem, key.split("."), accepted) for key in values}
