"""Whether a run fits the GPUs it is to run on, and which overrides make it fit. Imports no
torch.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from harness.config import recipe as recipes
from harness.config.schema import Backend, Recipe
from harness.config.validate import num_processes
from harness.core.errors import UserError
from rltrain.distributed import placement as parallel
from rltrain.distributed.gpus import Gpus, local_gpus
from rltrain.models.memory import GIB, Usage, checkpoints, shape_of, usage

PLACEMENT, GENERATOR, LORA = "trainer.placement", "generator", "trainer.policy.model.lora"
UTILIZATIONS = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
FEWEST_SEQUENCES = 16


def named_gpus(text: str, asked: int) -> Gpus:
    """The GPUs of `--gpu-memory`: `80`, as many as `asked`, or `8x80`, GiB each; raises UserError
    for anything else.
    """
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\d{1,4}(?:\.\d+)?)", text.strip())
    if found is None or float(found[2]) <= 0:
        raise UserError(
            "--gpu-memory cannot be read",
            got=text,
            allowed="GiB of each GPU, or COUNTxGiB: 80, 8x80",
        )
    return Gpus((int(found[1] or max(asked, 1)),), int(float(found[2]) * GIB))


def gpus_to_plan_for(recipe: Recipe, named: str | None) -> Gpus | None:
    """Those of `--gpu-memory`, else those that are there; None: the recipe uses none. A cluster's
    are not known here.

    Raises UserError for a `--gpu-memory` that cannot be read, or that a recipe for the CPU has no
    use for.
    """
    device = recipe.trainer.placement.device.name
    if named is not None and device == "cpu":
        raise UserError(
            "--gpu-memory names GPUs for a recipe that uses none",
            got=f"{PLACEMENT}.device=cpu",
            fix=f"{PLACEMENT}.device=cuda, or leave out --gpu-memory",
        )
    if named is not None:
        packs = recipe.sweep.max_concurrent or 1 if recipe.sweep is not None else 1
        return named_gpus(named, packs * gpus_asked(recipe))
    if device == "cpu":
        return None
    if parallel.address_of(recipe) is not None:
        return Gpus((), None)
    there = local_gpus()
    wants = device == "cuda" or parallel.needs_workers(recipe)
    return there if there.count or wants else None


def gpus_asked(recipe: Recipe) -> int:
    """GPUs that one run, or one pack, of a recipe for GPUs takes: its ranks', and those of engines
    apart.
    """
    placement, generator = recipe.trainer.placement, recipe.generator
    apart = 0 if placement.colocate_all else generator.num_inference_engines
    return num_processes(recipe) + apart * generator.inference_engine_tensor_parallel_size


def runs_together(recipe: Recipe) -> int:
    """Members of a pack of the recipe's sweep; 1 where there is none."""
    return (recipe.sweep.pack_size or 1) if recipe.sweep is not None else 1


def memory_table(recipe: Recipe, gpus: Gpus) -> str:
    """What each GPU holds by part and phase, in GiB, or why that is not known."""
    name = recipe.trainer.policy.model.path
    shape = shape_of(name)
    if gpus.memory is None:
        return (
            "memory: not known: name each GPU's with --gpu-memory 80, or all with "
            "--gpu-memory 4x80 (GiB)"
        )
    if shape is None:
        return (
            f"memory: not known: no config.json of {name} is on this machine, or it is "
            "of a kind not reckoned with"
        )
    held = usage(recipe, shape, gpus.memory, members=runs_together(recipe))
    together = runs_together(recipe)
    who = f"a pack of {together} runs" if together > 1 else "a run"
    count = f"each of {gpus_asked(recipe)} GPUs" if gpus_asked(recipe) > 1 else "the GPU"
    return f"memory of {who}, GiB on {count}\n{_rows(held, gpus.memory)}"


def _rows(held: Usage, memory: int) -> str:
    phases = held.phases()
    parts = dict.fromkeys(name for phase in phases.values() for name in phase)
    rows = [["", *phases]]
    rows += [
        [name, *(_gib(phase[name]) if name in phase else "" for phase in phases.values())]
        for name in parts
    ]
    rows.append(
        [
            f"in all, of {memory / GIB:.2f}",
            *(_gib(sum(phase.values())) for phase in phases.values()),
        ]
    )
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([name.ljust(first), *map(str.rjust, cells, others)] for name, *cells in rows)
    return "\n".join(f"  {'  '.join(cells)}".rstrip() for cells in aligned)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def check_fit(recipe: Recipe, gpus: Gpus | None) -> None:
    """Raise UserError for a run, or a sweep's pack, that the GPUs cannot hold, with overrides that
    they can.

    What is not known (the model's sizes, the GPUs' memory) refuses nothing.
    """
    if gpus is None or gpus.memory is None:
        return
    wrong = _problem(recipe, gpus)
    if wrong is None:
        return
    found = [
        " ".join(recipes.override_for(key, value) for key, value in one.items())
        for one in _fixes(recipe, gpus)
    ]
    raise UserError(
        "this does not fit the GPUs",
        got=wrong,
        allowed=f"{gpus}",
        fix=", or ".join(found)
        or "a smaller model, or more or larger GPUs: neither fewer members, sequences and "
        "tokens at a time nor more ranks make it fit these",
    )


def note_fit(recipe: Recipe, gpus: Gpus | None) -> None:
    """Say on stderr what `check_fit` would raise: a run may try what is an estimate, a dry run
    refuses it.
    """
    try:
        check_fit(recipe, gpus)
    except UserError as error:
        print(
            f"note: by estimate {str(error).removeprefix('error: ')}", file=sys.stderr, flush=True
        )


def _problem(recipe: Recipe, gpus: Gpus) -> str | None:
    """Why a recipe does not fit, in words; None when it does, or when that is not known."""
    asked = gpus_asked(recipe)
    if asked > gpus.count:
        return f"{asked} GPUs asked, {gpus.count} there"
    beyond = {what: (size, room) for what, size, room in _sizes(recipe, gpus) if size > room}
    return (
        "; ".join(
            f"{what}: {_gib(size)} GiB of {_gib(room)}" for what, (size, room) in beyond.items()
        )
        or None
    )


def _sizes(recipe: Recipe, gpus: Gpus) -> list[tuple[str, int, int]]:
    """What must fit: its name, its bytes, and those there are for it; nothing where sizes are not
    known.
    """
    shape = shape_of(recipe.trainer.policy.model.path)
    if shape is None or gpus.memory is None:
        return []
    held = usage(recipe, shape, gpus.memory, members=runs_together(recipe))
    share = int(recipe.generator.gpu_memory_utilization * gpus.memory)
    engine = [("the engine's own share", held.engine, share)] if held.engine else []
    return [
        (phase, sum(parts.values()), gpus.memory) for phase, parts in held.phases().items()
    ] + engine


def _excess(recipe: Recipe, changes: dict[str, Any], gpus: Gpus) -> float:
    """Bytes beyond what there is, of all that must fit taken together; infinite for what cannot be
    asked for.
    """
    try:
        changed = recipes.with_values(recipe, changes)
    except UserError:
        return math.inf
    if gpus_asked(changed) > gpus.count:
        return math.inf
    return sum(max(0, size - room) for _, size, room in _sizes(changed, gpus))


def _fixes(recipe: Recipe, gpus: Gpus) -> list[dict[str, Any]]:
    """Overrides that make a recipe fit: single changes that do, three at most, else the fewest
    together that do.
    """
    fewer = _fewer_gpus(recipe, gpus)
    if fewer is None:
        return []
    if fewer and _fits(recipe, fewer, gpus):
        return [fewer]
    base = recipes.with_values(recipe, fewer)
    axes = list(_changes(base, gpus))
    alone = [next((one for one in axis if _fits(base, one, gpus)), None) for axis in axes]
    found = [fewer | one for one in alone if one is not None][:3]
    return found or [fewer | one for one in _together(base, axes, gpus)]


def _together(
    recipe: Recipe, axes: Sequence[list[dict[str, Any]]], gpus: Gpus
) -> list[dict[str, Any]]:
    """Changes that fit together: of each kind in turn what helps most, until they do; then the
    mildest of it.
    """
    taken: list[dict[str, Any]] = [{} for _ in axes]
    for place in range(len(axes)):
        taken = min(
            _with_each(taken, place, axes), key=lambda one: _excess(recipe, _merged(one), gpus)
        )
        if _fits(recipe, _merged(taken), gpus):
            break
    else:
        return []
    for place in range(len(axes)):
        taken = next(
            one for one in _with_each(taken, place, axes) if _fits(recipe, _merged(one), gpus)
        )
    return [_merged(taken)]


def _with_each(
    taken: list[dict[str, Any]], place: int, axes: Sequence[list[dict[str, Any]]]
) -> Iterator[list[dict[str, Any]]]:
    """The changes with none of an axis, then with each of its own."""
    for one in [{}, *axes[place]]:
        yield [*taken[:place], one, *taken[place + 1 :]]


def _merged(changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for one in changes for key, value in one.items()}


def _fits(recipe: Recipe, changes: dict[str, Any], gpus: Gpus) -> bool:
    return _excess(recipe, changes, gpus) == 0


def _fewer_gpus(recipe: Recipe, gpus: Gpus) -> dict[str, Any] | None:
    """What makes a recipe ask for no more GPUs than there are; {}: it does not; None: there are
    none.
    """
    if gpus_asked(recipe) <= gpus.count:
        return {}
    ranks = min(recipe.trainer.placement.policy_num_gpus_per_node, max(gpus.per_machine, default=0))
    return _colocated(recipe, ranks) if ranks else None


def _colocated(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """So many ranks on one machine, each with its engine."""
    placement = recipe.trainer.placement
    wanted = {
        f"{PLACEMENT}.policy_num_gpus_per_node": ranks,
        f"{PLACEMENT}.policy_num_nodes": 1,
        f"{PLACEMENT}.colocate_all": True,
        f"{GENERATOR}.num_inference_engines": ranks,
        f"{GENERATOR}.inference_engine_tensor_parallel_size": 1,
    }
    for role in ("ref", "critic"):
        if getattr(placement, f"{role}_num_gpus_per_node") is not None:
            wanted[f"{PLACEMENT}.{role}_num_gpus_per_node"] = ranks
    return {key: value for key, value in wanted.items() if recipes.get(recipe, key) != value}


def _changes(recipe: Recipe, gpus: Gpus) -> Iterator[list[dict[str, Any]]]:
    """What may be changed to need less, each as a list from the mildest on; those that cost least
    come first.
    """
    trainer, generator = recipe.trainer, recipe.generator
    if trainer.max_tokens_per_microbatch != "auto":
        yield [{"trainer.max_tokens_per_microbatch": "auto"}]
    if not checkpoints(recipe, on_gpu=True):
        yield [{"trainer.gradient_checkpointing": True}]
    if generator.backend is Backend.vllm:
        shares = [share for share in UTILIZATIONS if share < generator.gpu_memory_utilization]
        yield [{f"{GENERATOR}.gpu_memory_utilization": share} for share in shares]
    yield [
        {f"{GENERATOR}.max_num_seqs": n} for n in _halves(generator.max_num_seqs, FEWEST_SEQUENCES)
    ]
    if recipe.sweep is not None:
        yield [{"sweep.pack_size": n} for n in _halves(runs_together(recipe), 1)]
    if generator.backend is Backend.vllm:
        ranks, most = num_processes(recipe), max(gpus.per_machine)
        if trainer.placement.colocate_all:
            yield [
                _colocated(recipe, n)
                for n in range(ranks + 1, most + 1)
                if n & (n - 1) == 0 or n == most
            ]
            yield [
                {f"{PLACEMENT}.colocate_all": False, f"{GENERATOR}.num_inference_engines": n}
                for n in range(gpus.count - ranks, 0, -1)
            ][:1]
    swept = recipe.sweep is not None and f"{LORA}.rank" in recipe.sweep.space
    if not swept:
        yield [{f"{LORA}.rank": n} for n in _halves(trainer.policy.model.lora.rank, 1)]


def _halves(number: int, least: int) -> list[int]:
    """Half of a number, a quarter of it, and so on, not below the least."""
    found = []
    while number // 2 >= least:
        number //= 2
        found.append(number)
    return found
