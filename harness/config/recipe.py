"""Find, compose (Hydra) and validate a recipe. Imports neither torch nor vllm nor ray."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import os
import re
import typing
from collections.abc import Iterable, Sequence
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

# Names that other projects give to values, too unlike ours to be guessed.
RENAMED_VALUES = {"gpu": "cuda", "fp32": "float32", "ppo": "gae"}

COMMAND_LINE = "the command line"
# The last line of a stored recipe begins with this, then has the checksum of the lines above.
_SUM = "# sha256 "


def load(path: str | Path, overrides: Sequence[str] = (), *, sweeps: bool = True) -> Recipe:
    """Compose the recipe in a YAML file with command-line overrides, and validate it.

    Where vLLM has no build, `generator.backend` becomes transformers. With `sweeps`, interpolations
    must not read a key that the sweep varies. Raises UserError for anything wrong.
    """
    # Imported here because most processes of a sweep only read recipes, and Hydra loads slowly.
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    file = find(path)
    overrides = [override for override in overrides if not _without_effect(override)]
    overridden = _values_of(overrides)
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
    recipe = from_dict(values, source=str(path), overridden=overridden)
    if sweeps and recipe.sweep is not None:
        plain: Any = OmegaConf.to_container(
            OmegaConf.merge(_schema(), _one_as_list(values)), enum_to_str=True
        )
        check_interpolations(plain, recipe.sweep.space)
    if _vllm_is_left_out():
        # The engine stays where transformers cannot serve the recipe.
        with contextlib.suppress(UserError):
            return with_values(recipe, {"generator.backend": Backend.transformers.name})
    return recipe


def notes(overrides: Sequence[str]) -> list[str]:
    """Return a note for each override that is accepted and has no effect."""
    keys = [override.partition("=")[0] for override in overrides if _without_effect(override)]
    return [f"{key} has no effect here: {WITHOUT_EFFECT[key]}" for key in keys]


def engine_notes(recipe: Recipe) -> list[str]:
    """Return a note for each engine or device that the installed packages cannot use."""
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


def read(path: Path) -> Recipe:
    """Read the resolved recipe in a run directory.

    Raises UserError when it is missing, damaged or was edited.
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
            fix="restore it from a copy; nothing was changed",
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
    """Return a validated recipe from plain nested values.

    Raises UserError naming the wrong key and where it was set: in `source`, or for `overridden`
    keys on the command line.
    """
    check_plain(values, source)
    for key in keys_given(values):
        check_key(key, source)
    values = _one_as_list(values)
    try:
        # Merging takes longer the more values it gets, so defaults are left out.
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
    """Return a copy of a recipe with dotted keys set to plain values, validated again."""
    for key in values:
        check_key(key, "these values")
    return from_dict(set_values(to_dict(recipe), values))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a copy of a recipe with command-line overrides applied, validated again."""
    values = _values_of(overrides)
    return from_dict(set_values(to_dict(recipe), values), overridden=values)


def _values_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values that overrides set, by dotted key; raises UserError for a wrong one."""
    parsed = [_check_override(override) for override in overrides]
    values = {str(override.key_or_group): override.value() for override in parsed}
    check_plain(values, COMMAND_LINE)
    return values


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain nested values, enums by name."""
    text = json.dumps(dataclasses.asdict(recipe), default=operator.attrgetter("name"))
    values: dict[str, Any] = json.loads(text)
    return values


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML; its last line is a comment with its SHA-256."""
    body = yaml.safe_dump(to_dict(recipe), sort_keys=False)
    return f"{body}{_SUM}{_sha256(body)}\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def get(recipe: Recipe, key: str) -> Any:
    """Return the value of a dotted key, e.g. `trainer.policy.model.lora.rank`."""
    return functools.reduce(getattr, key.split("."), recipe)


def override_for(key: str, value: Any) -> str:
    """Return a `key=value` override in Hydra's grammar that `load` reads back as `value`."""
    if isinstance(value, str) and _reads_back(key, value):
        return f"{key}={value}"
    return f"{key}={_written(value)}"


def find(path: str | Path) -> Path:
    """Return the recipe file that a path or name stands for.

    Raises UserError listing the recipes where there is none.
    """
    for candidate in (Path(path), RECIPES.parent / path, RECIPES / path, RECIPES / f"{path}.yaml"):
        if os.path.isfile(candidate):  # unlike Path.is_file, it does not raise for impossible names
            if candidate.suffix not in (".yaml", ".yml"):
                raise UserError("a recipe is a YAML file", got=candidate, allowed="*.yaml")
            return candidate.resolve()
    known = sorted(str(p.relative_to(RECIPES.parent)) for p in RECIPES.rglob("*.yaml"))
    by_name = {Path(name).stem: name for name in known} | {name: name for name in known}
    guess = by_name.get(nearest(str(path), by_name) or "")
    hint = f"did you mean {guess}?" if guess else "name one of the recipes, or your own file"
    raise UserError("no such recipe", got=path, allowed=", ".join(known), fix=hint)


def _check_file(file: Path) -> None:
    """Check a recipe file before Hydra reads it; raises UserError or YAMLError."""
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
    # Cached because building it takes half of a validation's time; merging copies it.
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
        elif name not in defaults or repr(value) != repr(default):  # repr: 1 == 1.0 == True
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
    """Read `trainer.logger: wandb` as a list of one."""
    trainer = values.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("logger"), str):
        return {**values, "trainer": {**trainer, "logger": [trainer["logger"]]}}
    return values


def _parse(override: str) -> Override:
    """Parse an override by Hydra's grammar; raises HydraException."""
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
    """Write a plain value in Hydra's grammar.

    That is JSON, except that only backslashes before a quote are doubled.
    """
    if isinstance(value, str):
        escaped = re.sub(
            r'(\\*)("|\Z)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), value
        )
        return f'"{escaped}"'
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
