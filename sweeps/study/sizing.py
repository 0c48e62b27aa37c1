"""The packs of a sweep: how many run at once, how many slots each has, and what each reserves.

`recipes/base.yaml` describes the rules (`sweep.max_concurrent`, `sweep.pack_size`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]

from harness.config import recipe as recipes
from harness.config.schema import Recipe, Sampler
from harness.config.validate import num_processes
from harness.core.errors import UserError
from rltrain.distributed.gpus import Gpus
from rltrain.distributed.placement import bundles, needs_workers, shares_base, uses_gpus
from rltrain.models import adapter_files
from rltrain.models.memory import members_that_fit, shape_of
from rltrain.tools.fit import gpus_to_plan_for, runs_together
from sweeps.study.plan import Plan

RANK = "trainer.policy.model.lora.rank"
# TPE proposes from results. If all trials started together, it would have none.
TPE_ROUNDS = 3


def settle(plan: Plan, gpus: Gpus | None = None) -> Plan:
    """Return a plan whose recipe says how many packs, slots and threads there are.

    A sweep that is resumed on another machine keeps these numbers. `gpus` defaults to this
    machine's.
    """
    gpus = gpus or gpus_to_plan_for(plan.recipe, None)
    packs = choose_num_packs(plan.recipe, gpus, plan.num_runs)
    size = choose_pack_size(plan.recipe, largest_trials(plan)[0], gpus, plan.num_runs, packs)
    values = {"sweep.max_concurrent": packs, "sweep.pack_size": size}
    recipe = recipes.with_values(plan.recipe, values)
    threads = threads_per_process(recipe)
    recipe = recipes.with_values(recipe, {"trainer.num_threads": threads})
    return Plan(recipe, plan.space, plan.first_trials)


def choose_num_packs(recipe: Recipe, gpus: Gpus | None, num_runs: int) -> int:
    """Return how many packs run at once, at least 1: what the GPUs, or the CPU's cores, allow."""
    assert recipe.sweep is not None
    if recipe.sweep.max_concurrent is not None:
        return recipe.sweep.max_concurrent
    if uses_gpus(recipe):
        machines = gpus.per_machine if gpus is not None else ()
        fitting = packs_that_fit(machines, [int(bundle["GPU"]) for bundle in bundles(recipe)])
    else:
        threads = recipe.trainer.num_threads
        fitting = (os.cpu_count() or 1) // (threads * num_processes(recipe)) if threads else 1
    return max(1, min(fitting, num_runs))


def packs_that_fit(machines: Sequence[int], bundle_gpus: Sequence[int]) -> int:
    """Return how many packs fit on machines with these numbers of GPUs.

    A pack has several bundles, and all GPUs of a bundle are on one machine.
    """
    free, packs = list(machines), 0
    while True:
        for count in sorted(bundle_gpus, reverse=True):
            machine = next((i for i, left in enumerate(free) if left >= count), None)
            if machine is None:
                return packs
            free[machine] -= count
        packs += 1


def choose_pack_size(
    recipe: Recipe, largest: Recipe, gpus: Gpus | None, num_runs: int, packs: int
) -> int:
    """Return the slots of a pack: as many trials like `largest` as fit into memory.

    The packs together have no more slots than the sweep has runs; with TPE, a third of that, so
    that it learns from results. 1 where trials share no base, or where the model's sizes or the
    GPUs' memory are unknown.
    """
    assert recipe.sweep is not None
    if recipe.sweep.pack_size is not None:
        return recipe.sweep.pack_size
    shape = shape_of(recipe.trainer.policy.model.path)
    on_gpu = uses_gpus(recipe)
    gpu_memory = gpus.memory if gpus is not None else None
    memory = gpu_memory if on_gpu else psutil.virtual_memory().available // packs
    if shape is None or memory is None or not shares_base(largest):
        return 1
    rounds = TPE_ROUNDS if recipe.sweep.sampler is Sampler.tpe else 1
    return min(
        math.ceil(num_runs / rounds / packs),
        members_that_fit(largest, shape, memory, on_gpu=on_gpu),
    )


def largest_trials(plan: Plan) -> list[Recipe]:
    """Return recipes of the trials that need most memory.

    They are a trial of the largest rank and, where rank 0 is in the space, full fine-tuning, which
    trains alone.
    """
    ranks = _ranks(plan)
    candidates: list[dict[str, Any]] = []
    if max(ranks) > 0:
        candidates.append({RANK: max(ranks), "generator.max_lora_rank": engine_rank(plan)})
        if plan.adapters:
            candidates[0][adapter_files.KEY] = plan.adapters[0]
    if min(ranks) == 0:
        candidates.append({RANK: 0, "generator.max_lora_rank": None, "sweep.pack_size": 1})
    largest = []
    for values in candidates:
        with contextlib.suppress(UserError):  # the recipe refuses it, so it is no trial
            largest.append(recipes.with_values(plan.recipe, values))
    return largest or [plan.recipe]


def engine_rank(plan: Plan) -> int | None:
    """Return the largest rank in the space: engines reserve room for it, so trials can share one.

    None where no trial has an adapter.
    """
    return plan.recipe.generator.max_lora_rank or max(_ranks(plan)) or None


def _ranks(plan: Plan) -> list[int]:
    """Return the lowest and the highest ranks in the space, those of adapters included."""
    stored = [adapter_files.find(path).rank for path in plan.adapters]
    if stored and None not in plan.space[adapter_files.KEY].bounds():
        return stored
    if any(axis.key == RANK for axis in plan.space.axes):
        return [*stored, *(int(rank) for rank in plan.space[RANK].bounds())]
    return [*stored, plan.recipe.trainer.policy.model.lora.rank]


def threads_per_process(recipe: Recipe) -> int:
    """Return how many CPU threads each process of a trial computes with."""
    processes = num_packs(recipe) * num_processes(recipe)
    return recipe.trainer.num_threads or max(1, (os.cpu_count() or 1) // processes)


def server_bundles(recipe: Recipe) -> list[dict[str, float]]:
    """Return the CPUs and GPUs that a pack server reserves: its own, then its ranks' and engines'.

    A server without a worker group has one bundle.
    """
    if needs_workers(recipe):
        return [{"CPU": 1.0}, *bundles(recipe)]
    return [{"CPU": float(threads_per_process(recipe)), "GPU": float(uses_gpus(recipe))}]


def gpus_per_pack(recipe: Recipe) -> int:
    """Return how many GPUs a pack server reserves; 0 on a CPU."""
    return int(sum(bundle.get("GPU", 0.0) for bundle in server_bundles(recipe)))


def num_packs(recipe: Recipe) -> int:
    """Return how many packs of a settled recipe run at once."""
    assert recipe.sweep is not None
    return recipe.sweep.max_concurrent or 1


def num_slots(recipe: Recipe) -> int:
    """Return how many trials of a settled recipe run at once, in all packs together."""
    return num_packs(recipe) * runs_together(recipe)


def describe_slots(recipe: Recipe) -> str:
    """Return how many trials run at once, and in which packs, in words."""
    packs, slots = num_packs(recipe), runs_together(recipe)
    details = f" in {packs} pack{'s' * (packs > 1)} of {slots} on one base" if slots > 1 else ""
    return f"{num_slots(recipe)} at a time{details}"
