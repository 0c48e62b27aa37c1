"""Which trials share a process, and which get one of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from sweeps.execution.server_pool import ServerPool
from tests.unit.sweeps.curves import LR, RANK, recipe_of

DROPOUT, SYNC = "trainer.policy.model.lora.dropout", "trainer.policy.model.lora.sync"
RUN = RunDir(Path("runs/trial"))


class Processes:
    """Stands in for Ray: which processes were started, with how much room, and which of
    them live.
    """

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.alive: set[str] = set()
        self.left: list[str] = []

    def start(self, name: str, run_dir: RunDir, slots: int) -> None:
        self.slots[name] = slots
        self.alive.add(name)

    def works(self, name: str) -> bool:
        return name in self.alive

    def remove(self, name: str, run_dir: RunDir) -> None:
        self.left.append(name)

    def end(self, name: str) -> None:
        self.alive.discard(name)


@pytest.fixture
def processes() -> Processes:
    return Processes()


def sweep(**settings: Any) -> Recipe:
    return recipe_of(**settings)


def trial(**values: Any) -> Recipe:
    return recipes.with_values(recipe_of(), {"sweep": None} | values)


def admit(pool: ServerPool, number: int, recipe: Recipe, *, alone: bool = False) -> str | None:
    return pool.admit(number, recipe, RUN, alone=alone)


def test_packs_fill_evenly(processes: Processes) -> None:
    pool = ServerPool(sweep(max_concurrent=2, pack_size=2), processes)
    assert [admit(pool, number, trial(**{LR: 1e-3})) for number in range(5)] == [
        "pack0",
        "pack1",
        "pack0",
        "pack1",
        None,
    ]
    assert processes.slots == {"pack0": 2, "pack1": 2}
    assert not pool.may_have_slot
    assert pool.remove(1, RUN)
    assert processes.left == ["pack1"]
    assert pool.may_have_slot
    assert admit(pool, 5, trial(**{LR: 1e-2})) == "pack1"


def test_packs_are_started_before_their_trials_are_asked_for(processes: Processes) -> None:
    pool = ServerPool(sweep(max_concurrent=2, pack_size=2), processes)
    pool.prepare(RUN, 1)
    assert processes.slots == {"pack0": 2}  # one trial is left: one pack
    processes.alive.clear()  # it has not come up yet
    assert [admit(pool, number, trial()) for number in range(3)] == ["pack0", "pack1", "pack0"]
    assert processes.slots == {"pack0": 2, "pack1": 2}


@pytest.mark.parametrize(("size", "values"), [(1, {}), (4, {RANK: 0, SYNC: "merge"})])
def test_nothing_is_started_for_trials_that_share_nothing(
    size: int, values: dict[str, Any], processes: Processes
) -> None:
    recipe = recipes.with_values(sweep(max_concurrent=1, pack_size=size), values)
    ServerPool(recipe, processes).prepare(RUN, 8)
    assert processes.slots == {}


@pytest.mark.parametrize("values", [{RANK: 0, SYNC: "merge"}, {DROPOUT: 0.1}, {SYNC: "merge"}])
def test_what_cannot_share_gets_a_process_of_its_own(
    values: dict[str, Any], processes: Processes
) -> None:
    pool = ServerPool(sweep(max_concurrent=1, pack_size=4), processes)
    assert admit(pool, 0, trial()) == "pack0"
    assert admit(pool, 1, trial(**values)) is None  # the pack is at its place
    assert admit(pool, 2, trial()) == "pack0"
    pool.remove(0, RUN)
    pool.remove(2, RUN)
    assert admit(pool, 1, trial(**values)) == "pack1"
    assert processes.slots["pack1"] == 1
    assert processes.alive == {"pack1"}
    assert admit(pool, 3, trial()) is None
    assert not pool.remove(1, RUN)
    assert admit(pool, 3, trial()) == "pack2"


def test_another_base_or_engine_is_another_pack(processes: Processes) -> None:
    pool = ServerPool(sweep(max_concurrent=2, pack_size=4), processes)
    other = trial(**{"generator.backend": "transformers"})
    assert [
        admit(pool, n, recipe) for n, recipe in enumerate([trial(), other, trial(), other])
    ] == ["pack0", "pack1", "pack0", "pack1"]
    pool.remove(1, RUN)
    pool.remove(3, RUN)
    assert (
        admit(pool, 4, trial()) == "pack2"
    )  # the emptiest place, though its process was for others
    assert "pack1" not in processes.alive


def test_nobody_joins_a_pack_whose_process_died(processes: Processes) -> None:
    pool = ServerPool(sweep(max_concurrent=1, pack_size=3), processes)
    for number in range(2):
        admit(pool, number, trial())
    processes.end("pack0")
    assert pool.remove(0, RUN)
    assert admit(pool, 2, trial()) is None
    assert not pool.may_have_slot
    assert pool.remove(1, RUN)
    assert admit(pool, 0, trial(), alone=True) == "pack1"
    assert processes.slots["pack1"] == 1
    assert not pool.remove(0, RUN)
    assert admit(pool, 2, trial()) == "pack2"


def test_one_after_the_other_they_keep_a_process(processes: Processes) -> None:
    pool = ServerPool(sweep(max_concurrent=1, pack_size=1), processes)
    for number in range(2):
        assert admit(pool, number, trial()) == "pack0"
        assert not pool.remove(number, RUN)
