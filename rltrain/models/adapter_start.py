"""The adapter that a run starts from: its settings in the recipe, and the run's copy of it.

Imports no torch.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import recipe as recipes
from harness.config.recipe_keys import axes_in
from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.core.paths import locate
from harness.records.files import damage, whole_folder, write_json
from harness.records.manifest import digest_adapter
from harness.records.run_dir import RunDir
from rltrain.models import adapter_files
from rltrain.models.adapter_files import CONFIG, KEY, WEIGHTS
from rltrain.models.targets import adapted, stored_modules

LORA = KEY.rpartition(".")[0]
RANK, ALPHA = f"{LORA}.rank", f"{LORA}.alpha"
_OWN = (f"{LORA}.target_modules", f"{LORA}.exclude_modules")
_SHARED = ("trainer.target_modules", "trainer.exclude_modules")


def compose(path: str | Path, overrides: Sequence[str] = (), *, sweeps: bool = True) -> Recipe:
    """Compose a recipe as `recipes.load` does, with the settings of the adapter it starts from.

    They are left open where the recipe's sweep varies the adapter: each trial has its own.
    """
    recipe = recipes.load(path, overrides, sweeps=sweeps)
    if sweeps and recipe.sweep is not None and KEY in axes_in(recipe.sweep.space):
        return recipe
    named = {override.partition("=")[0] for override in overrides}
    return with_adapter(recipe, {key: recipes.get(recipe, key) for key in named & {RANK, ALPHA}})


def with_adapter(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a copy of a recipe with dotted keys set to plain values, and with its adapter's.

    Rank, alpha and modules of the adapter that the recipe starts from replace defaults. Raises
    UserError for an adapter that cannot be found or trained, and where `values`, or a recipe that
    departs from the default, ask for another rank, alpha or modules than the adapter has.
    """
    path = values.get(KEY, recipe.trainer.policy.model.lora.adapter_path)
    if path is None:
        return recipes.with_values(recipe, dict(values)) if values else recipe
    start, defaults, settings = adapter_files.find(path), Recipe(), dict(values)

    def own(key: str) -> Any:
        return values.get(key, recipes.get(recipe, key))

    def is_given(key: str) -> bool:
        return key in values or own(key) != recipes.get(defaults, key)

    for key, value in ((RANK, start.rank), (ALPHA, start.alpha)):
        if own(key) != value and is_given(key):
            raise _differs(start.path, key, own(key), value)
        settings[key] = value
    limit = own("generator.max_lora_rank")
    if limit is not None and start.rank > limit:
        raise UserError(
            "the adapter's rank is above generator.max_lora_rank",
            got=f"{start.rank}, {KEY}={path}",
            allowed=f"<= {limit}",
        )
    asked = [
        own(shared) if own(key) is None else own(key)
        for key, shared in zip(_OWN, _SHARED, strict=True)
    ]
    if not _same_modules(own("trainer.policy.model.path"), asked, start.targets):
        given = [key for key in (*_OWN, *_SHARED) if is_given(key)]
        if given:
            raise _differs(start.path, given[0], own(given[0]), start.targets[0])
        settings |= zip(_OWN, start.targets, strict=True)
    return recipes.with_values(recipe, settings)


def _differs(path: str, key: str, own: Any, adapters: Any) -> UserError:
    return UserError(
        f"{key} is not that of the adapter that the run starts from",
        got=f"{own}, {KEY}={path}",
        allowed=adapters,
        fix=f"leave {key} out, or set it to the adapter's",
    )


def _same_modules(model: str, one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Return whether two pairs of targets and exclusions mean the same modules of a model."""
    known = stored_modules(model)
    if known is not None:
        return adapted(known, *one) == adapted(known, *other)
    first, second = (
        [value if isinstance(value, str) else sorted(value or ()) for value in pair]
        for pair in (one, other)
    )
    return first == second


def check(recipe: Recipe) -> None:
    """Raise UserError for an adapter to start from that is damaged or does not fit the base.

    Prints a note where the adapter names another base that it fits as well.
    """
    path, model = recipe.trainer.policy.model.lora.adapter_path, recipe.trainer.policy.model.path
    if path is None:
        return
    start = adapter_files.find(path)
    adapter_files.check(start, model)
    base = str(start.config.get("base_model_name_or_path") or model)
    if Path(base).name != Path(model).name and locate(base) != locate(model):
        print(f"note: the adapter {path} names another base, {base}; its tensors fit {model}")


def with_copy(recipe: Recipe, run_dir: RunDir) -> Recipe:
    """Return the recipe of a run that is resumed with the run's own copy, if there is one."""
    copy = run_dir.start_adapter
    return recipes.with_values(recipe, {KEY: str(copy)}) if copy.is_dir() else recipe


def keep(recipe: Recipe, run_dir: RunDir) -> Path | None:
    """Return the run's own copy of the adapter that it starts from, a PEFT folder; None without.

    The copy is made once. A run that is resumed needs nothing else, whatever became of the adapter
    meanwhile. Raises UserError where the copy is damaged, or was not made yet, and the adapter is
    no longer the one in the run's manifest.
    """
    path = recipe.trainer.policy.model.lora.adapter_path
    if path is None:
        return None
    copy, recorded = run_dir.start_adapter, run_dir.read_manifest().get("adapter") or {}
    changed = digest_adapter(path) != recorded.get("digest")
    why = damage(copy)
    if why is None:
        if changed:
            print(f"note: {path} has changed; the run has a copy of what it was", file=sys.stderr)
        return copy
    if changed:
        raise UserError(
            f"{KEY} is not what it was when the run was made, and the run has no sound copy",
            got=f"{path}; {copy}: {why}",
            fix="put the adapter back, or start a new run",
        )
    if copy.exists():
        run_dir.set_aside(copy, why)
    start = adapter_files.find(path)
    with whole_folder(copy) as new:
        shutil.copyfile(start.weights, new / WEIGHTS)
        write_json(new / CONFIG, start.config)
    return copy
