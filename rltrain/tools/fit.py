"""Whether a run fits its GPUs, and overrides that make it fit. Imports no torch."""

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
from rltrain.models.memory import GIB, checkpoints, shape_of, usage

PLACEMENT, GENERATOR, LORA = "trainer.placement", "generator", "trainer.policy.model.lora"
UTILIZATIONS = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
FEWEST_SEQUENCES = 16


def named_gpus(text: str, asked: int) -> Gpus:
    """Return the GPUs of `--gpu-memory`: `80`, for as many as `asked`, or `8x80`; GiB each.

    Raises UserError for any other text.
    """
    match = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(\d{1,4}(?:\.\d+)?)", text.strip())
    if match is None or float(match[2]) <= 0:
        raise UserError(
            "--gpu-memory cannot be read",
            got=text,
            allowed="GiB of each GPU, or COUNTxGiB: 80, 8x80",
        )
    return Gpus((int(match[1] or max(asked, 1)),), int(float(match[2]) * GIB))


def gpus_to_plan_for(recipe: Recipe, named: str | None) -> Gpus | None:
    """Return the GPUs of `--gpu-memory`, else this machine's; None for a recipe that uses none.

    A cluster's GPUs are unknown here. Raises UserError for a `--gpu-memory` that cannot be read, or
    with a recipe for the CPU.
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
    gpus = local_gpus()
    needs_gpus = device == "cuda" or parallel.needs_workers(recipe)
    return gpus if gpus.count or needs_gpus else None


def gpus_asked(recipe: Recipe) -> int:
    """Return the GPUs of one run, or one pack: its ranks', and those of separate engines."""
    placement, generator = recipe.trainer.placement, recipe.generator
    apart = 0 if placement.colocate_all else generator.num_inference_engines
    return num_processes(recipe) + apart * generator.inference_engine_tensor_parallel_size


def runs_together(recipe: Recipe) -> int:
    """Return the members of a pack of the recipe's sweep; 1 without a sweep."""
    return (recipe.sweep.pack_size or 1) if recipe.sweep is not None else 1


def memory_table(recipe: Recipe, gpus: Gpus) -> str:
    """Return what each GPU holds by part and phase, in GiB, or why that is unknown."""
    name = recipe.trainer.policy.model.path
    shape = shape_of(name)
    if gpus.memory is None:
        return (
            "memory: not known: name each GPU's with --gpu-memory 80, or all with "
            "--gpu-memory 4x80 (GiB)"
        )
    if shape is None:
        return (
            f"memory: not known: no config.json of {name} is on this machine, or its "
            "architecture is not supported"
        )
    held = usage(recipe, shape, gpus.memory, members=runs_together(recipe))
    together = runs_together(recipe)
    who = f"a pack of {together} runs" if together > 1 else "a run"
    count = f"each of {gpus_asked(recipe)} GPUs" if gpus_asked(recipe) > 1 else "the GPU"
    phases = held.phases()
    rows = [["", *phases]]
    rows += [
        [name, *(_gib(phase[name]) if name in phase else "" for phase in phases.values())]
        for name in dict.fromkeys(name for phase in phases.values() for name in phase)
    ]
    totals = [_gib(sum(phase.values())) for phase in phases.values()]
    rows.append([f"in all, of {gpus.memory / GIB:.2f}", *totals])
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([name.ljust(first), *map(str.rjust, cells, others)] for name, *cells in rows)
    lines = [f"  {'  '.join(cells)}".rstrip() for cells in aligned]
    return "\n".join([f"memory of {who}, GiB on {count}", *lines])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def check_fit(recipe: Recipe, gpus: Gpus | None) -> None:
    """Raise UserError for a run, or a sweep's pack, that does not fit the GPUs.

    The error names overrides that fit. A model or memory of unknown size is not refused.
    """
    if gpus is None or gpus.memory is None:
        return
    asked = gpus_asked(recipe)
    if asked > gpus.count:
        reason = f"{asked} GPUs asked, {gpus.count} there"
    else:
        reason = "; ".join(
            f"{name}: {_gib(size)} GiB of {_gib(room)}"
            for name, size, room in _sizes(recipe, gpus)
            if size > room
        )
    if not reason:
        return
    fixes = [
        " ".join(recipes.override_for(key, value) for key, value in changes.items())
        for changes in _fixes(recipe, gpus)
    ]
    raise UserError(
        "this does not fit the GPUs",
        got=reason,
        allowed=f"{gpus}",
        fix=", or ".join(fixes)
        or "a smaller model, or more or larger GPUs: neither fewer members, sequences and "
        "tokens at a time nor more ranks make it fit these",
    )


def note_fit(recipe: Recipe, gpus: Gpus | None) -> None:
    """Print what `check_fit` raises to stderr: it is an estimate, which only a dry run refuses."""
    try:
        check_fit(recipe, gpus)
    except UserError as error:
        print(
            f"note: by estimate {str(error).removeprefix('error: ')}", file=sys.stderr, flush=True
        )


def _sizes(recipe: Recipe, gpus: Gpus) -> list[tuple[str, int, int]]:
    """Return what must fit as (name, bytes, available bytes); empty where sizes are unknown."""
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
    """Return the missing bytes with some changes; infinite where these are not allowed."""
    try:
        changed = recipes.with_values(recipe, changes)
    except UserError:
        return math.inf
    if gpus_asked(changed) > gpus.count:
        return math.inf
    return sum(max(0, size - room) for _, size, room in _sizes(changed, gpus))


def _fixes(recipe: Recipe, gpus: Gpus) -> list[dict[str, Any]]:
    """Return overrides that make a recipe fit: up to three single changes, else one combination."""
    fewer: dict[str, Any] = {}
    if gpus_asked(recipe) > gpus.count:
        most = max(gpus.per_machine, default=0)
        ranks = min(recipe.trainer.placement.policy_num_gpus_per_node, most)
        if not ranks:
            return []
        fewer = _colocated(recipe, ranks)
    if fewer and _excess(recipe, fewer, gpus) == 0:
        return [fewer]
    base = recipes.with_values(recipe, fewer)
    axes = list(_changes(base, gpus))
    single = [
        next((changes for changes in axis if _excess(base, changes, gpus) == 0), None)
        for axis in axes
    ]
    fixes = [fewer | changes for changes in single if changes is not None][:3]
    return fixes or [fewer | changes for changes in _together(base, axes, gpus)]


def _together(
    recipe: Recipe, axes: Sequence[list[dict[str, Any]]], gpus: Gpus
) -> list[dict[str, Any]]:
    """Return a combination of changes that fits, or nothing.

    It adds of each kind in order what helps most, until the recipe fits, and then replaces each by
    the mildest that still fits.
    """
    chosen: list[dict[str, Any]] = [{} for _ in axes]

    def excess(index: int, changes: dict[str, Any]) -> float:
        """Return the excess with other changes of one kind, the rest as chosen."""
        candidates = [*chosen[:index], changes, *chosen[index + 1 :]]
        merged = {key: value for kind in candidates for key, value in kind.items()}
        return _excess(recipe, merged, gpus)

    for index, axis in enumerate(axes):
        chosen[index] = min([{}, *axis], key=lambda changes: excess(index, changes))
        if excess(index, chosen[index]) == 0:
            break
    else:
        return []
    for index, axis in enumerate(axes):
        chosen[index] = next(c for c in [{}, *axis] if excess(index, c) == 0)
    return [{key: value for kind in chosen for key, value in kind.items()}]


def _colocated(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """Return values for this many ranks on one machine, each with its engine."""
    placement = recipe.trainer.placement
    values = {
        f"{PLACEMENT}.policy_num_gpus_per_node": ranks,
        f"{PLACEMENT}.policy_num_nodes": 1,
        f"{PLACEMENT}.colocate_all": True,
        f"{GENERATOR}.num_inference_engines": ranks,
        f"{GENERATOR}.inference_engine_tensor_parallel_size": 1,
    }
    for role in ("ref", "critic"):
        if getattr(placement, f"{role}_num_gpus_per_node") is not None:
            values[f"{PLACEMENT}.{role}_num_gpus_per_node"] = ranks
    return {key: value for key, value in values.items() if recipes.get(recipe, key) != value}


def _changes(recipe: Recipe, gpus: Gpus) -> Iterator[list[dict[str, Any]]]:
    """Yield changes that need less memory, a list per kind, each from the mildest on.

    Kinds that cost least come first.
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
    if not swept and trainer.policy.model.lora.adapter_path is None:
        yield [{f"{LORA}.rank": n} for n in _halves(trainer.policy.model.lora.rank, 1)]


def _halves(number: int, least: int) -> list[int]:
    """Return half of a number, a quarter of it, and so on, down to `least`."""
    halves = []
    while number // 2 >= least:
        number //= 2
        halves.append(number)
    return halves
