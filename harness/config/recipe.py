"""Find, compose (Hydra) and validate a recipe. Imports neither torch nor vllm nor ray."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from harness.config.bounds import described, names_of
from harness.config.plain import check_plain
from harness.config.recipe_keys import (
    WITHOUT_EFFECT,
    check_interpolations,
    check_key,
    keys_given,
    set_values,
)
from harness.config.schema import Backend, Device, Recipe
from harness.config.validate import check
from harness.core import machine
from harness.core.errors import UserError, nearest
from harness.core.paths import RECIPES

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# What others call a value that has another name here, and is too unlike it for a guess.
RENAMED_VALUES = {"gpu": "cuda", "fp32": "float32", "ppo": "gae"}

COMMAND_LINE = "the command line"
# What stands before a stored recipe's own checksum, in its last line.
_SUM = "# sha256 "


def load(path: str | Path, overrides: Sequence[str] = (), *, sweeps: bool = True) -> Recipe:
    """The recipe in a YAML file with command-line overrides applied, validated; raises UserError on
    anything wrong.

    Where vLLM has no build, `generator.backend` is that of the engine that stands in for it. With
    `sweeps` an interpolation must not read a key that the sweep varies; one run alone has one value
    of each.
    """
    # Here, not above: a sweep's many processes only read recipes that were composed before.
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    file = find(path)
    overrides = [override for override in overrides if not _without_effect(override)]
    given = _values_of(overrides)
    try:
        _check_file(file)
        with initialize_config_dir(str(file.parent), version_base="1.3"):
            composed = compose(
                file.stem, [f"hydra.searchpath=[file://{RECIPES}]", *(f"++{o}" for o in overrides)]
            )
    except (
        HydraException,
        OmegaConfBaseException,
        yaml.YAMLError,
        ValueError,
        RecursionError,
        OSError,
    ) as error:
        fix = "correct the override" if "merging override" in str(error) else "correct the YAML"
        raise UserError(
            f"cannot compose the recipe {path}", got=_first_line(error), fix=fix
        ) from None
    values: dict[str, Any] = OmegaConf.to_container(composed)  # type: ignore[assignment]
    recipe = from_dict(values, source=str(path), overridden=given)
    if sweeps and recipe.sweep is not None:
        plain: Any = OmegaConf.to_container(
            OmegaConf.merge(_schema(), _one_as_list(values)), enum_to_str=True
        )
        check_interpolations(plain, recipe.sweep.space)
    return _without_vllm(recipe) if _vllm_is_left_out() else recipe


def notes(overrides: Sequence[str]) -> list[str]:
    """What a user should know of overrides that are taken and have no effect."""
    keys = [override.partition("=")[0] for override in overrides if _without_effect(override)]
    return [f"{key} has no effect here: {WITHOUT_EFFECT[key]}" for key in keys]


def engine_notes(recipe: Recipe) -> list[str]:
    """Return what a user should know of engine and device: what this system's packages keep a
    recipe from using.
    """
    notes = []
    if recipe.generator.backend is Backend.transformers and _vllm_is_left_out():
        notes.append(
            "vLLM has no build for this system: the in-process engine samples "
            "(generator.backend=transformers)"
        )
    gpus = machine.present_gpus()
    if (
        recipe.trainer.placement.device is Device.auto
        and gpus
        and machine.torch_cuda_version() is None
    ):
        notes.append(
            f"this machine has {gpus} NVIDIA GPUs, and torch is its CPU build: training "
            "runs on the CPU "
            "(make install-gpu makes an environment for GPUs)"
        )
    return notes


def _vllm_is_left_out() -> bool:
    return not machine.vllm_has_builds() and not machine.has_vllm()


def _without_vllm(recipe: Recipe) -> Recipe:
    """Return a recipe with the in-process engine in vLLM's place; unchanged where that engine
    cannot serve it.
    """
    try:
        return with_values(recipe, {"generator.backend": Backend.transformers.name})
    except UserError:
        return recipe


def read(path: Path) -> Recipe:
    """The resolved recipe that a run directory keeps; raises UserError when it is missing, damaged
    or was edited.
    """
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise UserError("cannot read a run's recipe", got=f"{path}: {_first_line(error)}") from None
    body, mark, digest = text.rpartition(_SUM)
    if not mark or digest.strip() != _sha256(body):
        raise UserError(
            "a run's recipe is damaged, or was edited",
            got=f"{path}: its SHA-256 is not the one in its last line",
            fix="put a copy of it back; nothing was changed",
        )
    try:
        values = yaml.safe_load(body)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError("cannot read a run's recipe", got=f"{path}: {_first_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError("a run's recipe is damaged", got=path)
    return from_dict(values, source=str(path))


def from_dict(
    values: dict[str, Any], *, source: str = "the recipe", overridden: Iterable[str] = ()
) -> Recipe:
    """A validated recipe from plain nested values; raises UserError naming the key at fault, and
    where it was set.

    That is `source`, and the command line for the keys that are `overridden`.
    """
    check_plain(values, source)
    for key in keys_given(values):
        check_key(key, source)
    values = _one_as_list(values)
    try:
        # Of values that are the defaults the merge would make the same, and take longer.
        merged = OmegaConf.merge(_schema(), _without_defaults(values, _defaults()))
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "").partition("[")[0]
        if any(
            f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in overridden
        ):
            source = COMMAND_LINE
        raise _value_error(error, source) from None
    assert isinstance(recipe, Recipe)
    check(recipe)
    return recipe


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """A copy of a recipe with dotted keys set to plain values, validated again."""
    for key in values:
        check_key(key, "these values")
    return from_dict(set_values(to_dict(recipe), values))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A copy of a recipe with command-line overrides applied, validated again."""
    values = _values_of(overrides)
    return from_dict(set_values(to_dict(recipe), values), overridden=values)


def _values_of(overrides: Sequence[str]) -> dict[str, Any]:
    """What command-line overrides set, by dotted key; raises UserError for one that no recipe can
    hold.
    """
    parsed = [_check_override(override) for override in overrides]
    values = {str(one.key_or_group): one.value() for one in parsed}
    check_plain(values, COMMAND_LINE)
    return values


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain nested values, enums by name."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe), default=_enum_name))
    return values


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out, and at the end its SHA-256 as a
    comment.
    """
    body = yaml.safe_dump(to_dict(recipe), sort_keys=False)
    return f"{body}{_SUM}{_sha256(body)}\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def get(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key, e.g. `trainer.policy.model.lora.rank`."""
    return functools.reduce(getattr, key.split("."), recipe)


def override_for(key: str, value: Any) -> str:
    """One `key=value` command-line override in Hydra's grammar, such that `load` reads back the
    same value.
    """
    if isinstance(value, str) and _reads_back(key, value):
        return f"{key}={value}"
    return f"{key}={_written(value)}"


def find(path: str | Path) -> Path:
    """The recipe file a path names; raises UserError listing the recipes there are."""
    for candidate in (Path(path), RECIPES.parent / path, RECIPES / path, RECIPES / f"{path}.yaml"):
        if os.path.isfile(candidate):  # unlike Path's, it says no to a name that no file can have
            if candidate.suffix not in (".yaml", ".yml"):
                raise UserError("a recipe is a YAML file", got=candidate, allowed="*.yaml")
            return candidate.resolve()
    known = sorted(str(p.relative_to(RECIPES.parent)) for p in RECIPES.rglob("*.yaml"))
    by_name = {Path(name).stem: name for name in known} | {name: name for name in known}
    guess = by_name.get(nearest(str(path), by_name) or "")
    hint = f"did you mean {guess}?" if guess else "name one of the recipes, or your own file"
    raise UserError("no such recipe", got=path, allowed=", ".join(known), fix=hint)


def _check_file(file: Path) -> None:
    """What a recipe file may not say, before Hydra acts on it; raises UserError, or YAMLError where
    it is no YAML.
    """
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    if values is None:
        return
    check_plain(values, str(file))
    if "hydra" in values:
        raise UserError(
            f"unknown key in {file}", got="hydra", fix="recipes/base.yaml lists every key"
        )


@functools.cache
def _schema() -> DictConfig:
    # Building it takes half of a validation's time; merging copies it.
    return OmegaConf.structured(Recipe)


@functools.cache
def _defaults() -> dict[str, Any]:
    values: dict[str, Any] = OmegaConf.to_container(_schema(), enum_to_str=True)  # type: ignore[assignment]
    return values


def _without_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            kept[name] = _without_defaults(value, default)
        elif name not in defaults or repr(value) != repr(default):  # 1, 1.0 and true are equal
            kept[name] = value
    return kept


def _without_effect(override: str) -> bool:
    key, _, value = override.partition("=")
    if key == "generator.run_engines_locally" and value.strip("\"'").lower() == "false":
        raise UserError(
            f"{key}: engines on other servers are not supported",
            got=value,
            allowed="true",
            fix="trainer.placement.colocate_all=false gives engines processes of their own",
        )
    return key in WITHOUT_EFFECT


def _one_as_list(values: dict[str, Any]) -> dict[str, Any]:
    """`trainer.logger: wandb` means a list of one."""
    trainer = values.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("logger"), str):
        return {**values, "trainer": {**trainer, "logger": [trainer["logger"]]}}
    return values


def _parse(override: str) -> Override:
    """An override by Hydra's grammar; raises HydraException."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override)


def _check_override(override: str) -> Override:
    from hydra.errors import HydraException

    try:
        parsed = _parse(override)
    except HydraException as error:
        raise UserError(
            "cannot read an override", got=override, allowed="key=value", fix=_first_line(error)
        ) from None
    if override.startswith(("+", "~")):
        raise UserError(
            "every key already exists: overrides neither add nor delete",
            got=override,
            allowed="key=value",
        )
    if parsed.is_sweep_override():
        raise UserError(
            "an override has one value", got=override, fix="name several values under sweep.space"
        )
    check_key(str(parsed.key_or_group), COMMAND_LINE)
    return parsed


def _value_error(error: OmegaConfBaseException, source: str) -> UserError:
    key = str(error.full_key or error.key or "the recipe")
    if "missing mandatory value" in str(error).lower():
        return UserError(f"{key} must be set", fix=f"give it in {source} or as {key}=...")
    hint = _hint_of(key)
    value = error.value if isinstance(error, ValidationError) else _first_line(error)
    names = dict.fromkeys(names_of(hint))
    guess = RENAMED_VALUES.get(str(value)) or nearest(str(value).lower(), names)
    return UserError(
        f"{source}: {key} cannot take this value",
        got="null" if str(value) == "None" else value,
        allowed=described(hint),
        fix=f"did you mean {guess}?" if guess in names else None,
    )


def _hint_of(key: str) -> Any:
    hint: Any = Recipe
    for part in key.split("[")[0].split("."):
        inner = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
        hint = typing.get_type_hints(inner[0]).get(part, Any) if inner else Any
    return hint


def _written(value: Any) -> str:
    """A plain value in Hydra's grammar, which is JSON but for backslashes: only those before a
    quote are doubled.
    """
    if isinstance(value, str):
        return (
            '"'
            + re.sub(
                r'(\\*)("|\Z)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value
            )
            + '"'
        )
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_written(inner)}" for name, inner in value.items()) + "}"
    return json.dumps(value)


def _reads_back(key: str, value: str) -> bool:
    from hydra.errors import HydraException

    try:
        return bool(_parse(f"{key}={value}").value() == value)
    except HydraException:
        return False


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _enum_name(value: object) -> str:
    if isinstance(value, Enum):
        return value.name
    raise TypeError(f"a recipe holds no {type(value).__name__}")
