"""How many packs a sweep trains at a time, and how many trials in each, where the recipe leaves
that open.

`recipes/base.yaml` has the rules in words (`sweep.max_concurrent`, `sweep.pack_size`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import psutil  # type: ignore[import-untyped]

from harness.config.schema import Recipe, Sampler
from harness.config.shapes import shape_of
from harness.config.validate import num_processes
from rltrain.distributed.gpus import Gpus
from rltrain.distributed.placement import bundles, shares_base, uses_gpus
from rltrain.models.memory import members_that_fit

TPE_ROUNDS = 3
"""TPE proposes from results: with all trials at once it would have none."""


def num_packs(recipe: Recipe, gpus: Gpus | None, num_runs: int) -> int:
    """Packs at a time: one for each GPU, or so many GPUs as a run needs; on a CPU by its cores; 1
    at least.
    """
    assert recipe.sweep is not None
    if recipe.sweep.max_concurrent is not None:
        return recipe.sweep.max_concurrent
    if uses_gpus(recipe):
        fitting = packs_on(
            (gpus or Gpus((), None)).per_machine, [int(one["GPU"]) for one in bundles(recipe)]
        )
    else:
        threads = recipe.trainer.num_threads
        fitting = (os.cpu_count() or 1) // (threads * num_processes(recipe)) if threads else 1
    return max(1, min(fitting, num_runs))


def packs_on(machines: Sequence[int], needs: Sequence[int]) -> int:
    """How many times GPUs for `needs` can be had, each of the needs on one of the machines."""
    free, packs = list(machines), 0
    while True:
        for need in sorted(needs, reverse=True):
            place = next((i for i, left in enumerate(free) if left >= need), None)
            if place is None:
                return packs
            free[place] -= need
        packs += 1


def pack_size(recipe: Recipe, largest: Recipe, gpus: Gpus | None, num_runs: int, packs: int) -> int:
    """Trials of a pack: what memory holds of the `largest`, and no more than the sweep's runs can
    fill.

    TPE's packs hold a third of its runs together, so that it learns from results. 1 where runs
    share no base, or the model's sizes or the GPUs' memory are not known.
    """
    assert recipe.sweep is not None
    if recipe.sweep.pack_size is not None:
        return recipe.sweep.pack_size
    shape = shape_of(recipe.trainer.policy.model.path)
    on_gpu = uses_gpus(recipe)
    on_each = gpus.memory if gpus is not None else None
    memory = on_each if on_gpu else psutil.virtual_memory().available // packs
    if shape is None or memory is None or not shares_base(largest):
        return 1
    rounds = TPE_ROUNDS if recipe.sweep.sampler is Sampler.tpe else 1
    return min(
        math.ceil(num_runs / rounds / packs),
        members_that_fit(largest, shape, memory, on_gpu=on_gpu),
    )
