"""Test the packs that a sweep chooses, and the resources that they reserve."""

from __future__ import annotations

import os
from typing import Any

import pytest

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from rltrain.distributed import gpus
from rltrain.distributed import placement as parallel
from rltrain.distributed.gpus import Gpus
from rltrain.models.memory import GIB
from rltrain.tools import fit
from sweeps import dry_run
from sweeps.execution.server_pool import ServerPool
from sweeps.study import plan as plans
from sweeps.study import sizing
from tests.unit.sweeps.curves import LR, RANK, recipe_of

DROPOUT = "trainer.policy.model.lora.dropout"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight GPUs of 80 GiB and 64 cores."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(parallel, "visible_gpus", lambda: 8)
    monkeypatch.setattr(gpus, "visible_memory", lambda: [80 * GIB] * 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def sweep(*overrides: str, name: str = "gsm8k_lora") -> Recipe:
    return recipes.load(name, list(overrides))


def settle(recipe: Recipe, gpus: Gpus | None = None) -> Recipe:
    return sizing.settle(plans.build(recipe), gpus).recipe


def chosen(recipe: Recipe, gpus: Gpus | None = None) -> tuple[int | None, int | None]:
    settled = settle(recipe, gpus).sweep
    assert settled is not None
    return settled.max_concurrent, settled.pack_size


@pytest.mark.parametrize(
    "name", ["gsm8k_lora", "gsm8k_ppo_lora", "lora_without_regret/qwen/lr_by_rank"]
)
def test_every_gpu_gets_a_pack_by_default(name: str) -> None:
    recipe = sweep(name=f"recipes/{name}.yaml")
    settled = settle(recipe)
    assert sizing.num_packs(settled) == 8
    assert sizing.gpus_per_pack(settled) == 1
    assert sizing.server_bundles(settled) == [{"CPU": 8.0, "GPU": 1.0}]
    assert settled.trainer.num_threads == 8
    assert "in 8 packs" in dry_run.describe(plans.build(recipe), "my.yaml", Gpus((8,), 80 * GIB))


def test_a_process_that_dies_leaves_the_other_packs_running() -> None:
    """Four GPUs have four packs in four processes, not one pack over all of them."""

    class Processes:
        opened: tuple[str, ...] = ()

        def start(self, name: str, *_: Any) -> None:
            self.opened += (name,)

        def works(self, name: str) -> bool:
            return name != "pack0"

        def remove(self, *_: Any) -> None: ...

        def end(self, name: str) -> None: ...

    recipe, processes = settle(sweep(), Gpus((4,), 80 * GIB)), Processes()
    assert sizing.gpus_per_pack(recipe) == 1
    pool = ServerPool(recipe, processes)
    trial = recipes.with_values(recipe, {"sweep": None})
    servers, run_dir = [], RunDir("runs/trial")
    for number in range(8):
        servers.append(pool.admit(number, trial, run_dir, alone=False))
    assert processes.opened == ("pack0", "pack1", "pack2", "pack3")
    assert servers == ["pack0", "pack1", "pack2", "pack3"] * 2
    pool.remove(0, run_dir)
    assert pool.admit(8, trial, run_dir, alone=False) == "pack1"


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        # 72 runs with TPE: 24 of them at once, and at most 16 in a pack.
        ([], Gpus((8,), 80 * GIB), (8, 3)),
        ([], Gpus((4,), 80 * GIB), (4, 6)),
        ([], Gpus((1,), 80 * GIB), (1, 16)),
        (["sweep.num_trials=3", "sweep.seeds=[0]"], Gpus((8,), 80 * GIB), (3, 1)),
        (["sweep.sampler=random"], Gpus((8,), 80 * GIB), (8, 9)),
        (["sweep.max_concurrent=2"], Gpus((8,), 80 * GIB), (2, 12)),
        (["sweep.pack_size=5"], Gpus((8,), 80 * GIB), (8, 5)),
        ([], Gpus((8,), None), (8, 1)),
        (["trainer.policy.model.path=someone/unknown"], Gpus((8,), 80 * GIB), (8, 1)),
        ([f"{DROPOUT}=0.1"], Gpus((8,), 80 * GIB), (8, 1)),
        # Four ranks per pack: two machines of five GPUs have room for one each.
        (
            ["trainer.placement.policy_num_gpus_per_node=4", "generator.num_inference_engines=4"],
            Gpus((5, 5), 80 * GIB),
            (2, 12),
        ),
        (
            ["trainer.placement.colocate_all=false", "generator.num_inference_engines=2"],
            Gpus((8,), 80 * GIB),
            (2, 12),
        ),
    ],
)
def test_packs_and_their_size(overrides: list[str], gpus: Gpus, expected: tuple[int, int]) -> None:
    assert chosen(sweep(*overrides), gpus) == expected


def test_memory_limits_a_pack() -> None:
    seven = sweep(
        "trainer.policy.model.path=Qwen/Qwen2.5-7B-Instruct", "generator.max_num_seqs=256"
    )
    _, on_80 = chosen(seven, Gpus((1,), 80 * GIB))
    _, on_141 = chosen(seven, Gpus((1,), 141 * GIB))
    assert on_80 is not None
    assert on_141 is not None
    assert 1 <= on_80 < on_141


@pytest.mark.parametrize(("threads", "packs"), [(None, 1), (16, 4), (100, 1)])
def test_packs_divide_the_cores(threads: int | None, packs: int) -> None:
    recipe = sweep(
        "trainer.placement.device=cpu", "sweep.sampler=random", name="recipes/gsm8k_lora.yaml"
    )
    recipe.trainer.num_threads = threads
    settled = settle(recipe)
    assert sizing.num_packs(settled) == packs
    assert settled.trainer.num_threads == (threads or 64)


def test_a_settled_recipe_stays_as_it_is() -> None:
    settled = settle(sweep())
    assert settle(settled, Gpus((2,), 24 * GIB)) == settled


def test_largest_trials() -> None:
    plan = plans.build(settle(sweep(name="recipes/lora_without_regret/qwen/lr_by_rank.yaml")))
    pack, full = sizing.largest_trials(plan)
    assert (pack.trainer.policy.model.lora.rank, pack.generator.max_lora_rank) == (64, 64)
    assert fit.runs_together(pack) == fit.runs_together(plan.recipe) > 1
    assert (full.trainer.policy.model.lora.rank, fit.runs_together(full)) == (0, 1)
    other = recipes.with_values(
        plan.recipe, {"sweep.space": {LR: {"choices": [1e-5, 1e-4]}}, "sweep.first_trials": []}
    )
    (alone,) = sizing.largest_trials(plans.build(other))
    assert alone.trainer.policy.model.lora.rank == 32
    assert RANK not in (other.sweep.space if other.sweep else {})


def test_a_cluster_that_is_not_reached_yet_plans_nothing() -> None:
    text = dry_run.describe(
        plans.build(sweep("ray.address=10.0.0.1:6379")), "my.yaml", Gpus((), None)
    )
    assert "as many packs as the GPUs hold" in text
    assert "--gpu-memory" in text


def test_engines_reserve_room_for_the_largest_rank() -> None:
    recipe = recipe_of({RANK: {"choices": [1, 64, 8]}}, max_concurrent=2)
    recipe.trainer.num_threads = None
    assert settle(recipe).trainer.num_threads == sizing.threads_per_process(recipe)
    assert sizing.engine_rank(plans.build(recipe)) == 64
    # The recipe's rank counts only where rank is no axis; max_lora_rank in the recipe stays.
    assert sizing.engine_rank(plans.build(recipe_of({RANK: {"choices": [1, 8]}}))) == 8
    other = recipe_of({LR: {"low": 1e-5, "high": 1e-3}})
    assert sizing.engine_rank(plans.build(other)) == 32
    other.generator.max_lora_rank = 256
    assert sizing.engine_rank(plans.build(other)) == 256


@pytest.mark.parametrize(("threads", "concurrent", "expected"), [(3, 1, 3), (None, 10_000, 1)])
def test_processes_divide_the_cores(threads: int | None, concurrent: int, expected: int) -> None:
    recipe = recipe_of(max_concurrent=concurrent)
    recipe.trainer.num_threads = threads
    assert sizing.threads_per_process(recipe) == expected


def test_a_pack_on_a_cpu_reserves_no_gpu() -> None:
    assert sizing.gpus_per_pack(recipe_of()) == 0
    assert sizing.gpus_per_pack(_on_gpus(recipe_of(), ranks=1)) == 1


def test_a_pack_reserves_resources_for_each_rank_and_engine() -> None:
    recipe = _on_gpus(recipe_of(), ranks=4)
    assert sizing.gpus_per_pack(recipe) == 4
    threads = float(recipe.trainer.num_threads or 1)
    assert sizing.server_bundles(recipe) == [{"CPU": 1.0}, {"CPU": 4 * threads, "GPU": 4.0}]
    apart = recipes.with_values(
        recipe,
        {
            "trainer.placement.colocate_all": False,
            "generator.inference_engine_tensor_parallel_size": 2,
        },
    )
    assert sizing.gpus_per_pack(apart) == 4 + 4 * 2
    assert len(sizing.server_bundles(apart)) == 2 + 4


def _on_gpus(recipe: Recipe, *, ranks: int) -> Recipe:
    return recipes.with_values(
        recipe,
        {
            "trainer.placement.device": "cuda",
            "generator.num_inference_engines": ranks,
            "trainer.placement.policy_num_gpus_per_node": ranks,
        },
    )
