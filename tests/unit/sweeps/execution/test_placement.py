"""Which trials share a process, and which get one of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from sweeps.execution.placement import Places
from tests.unit.sweeps.curves import LR, RANK, recipe_of

DROPOUT, SYNC = "trainer.policy.model.lora.dropout", "trainer.policy.model.lora.sync"
RUN = RunDir(Path("runs/trial"))


class Processes:
    """Stands in for Ray: which processes were started, with how much room, and which of
    them live.
    """

    def __init__(self) -> None:
        self.rooms: dict[str, int] = {}
        self.alive: set[str] = set()
        self.left: list[str] = []

    def open(self, name: str, run_dir: RunDir, room: int) -> None:
        self.rooms[name] = room
        self.alive.add(name)

    def lives(self, name: str) -> bool:
        return name in self.alive

    def leave(self, name: str, run_dir: RunDir) -> None:
        self.left.append(name)

    def close(self, name: str) -> None:
        self.alive.discard(name)


@pytest.fixture
def processes() -> Processes:
    return Processes()


def sweep(**settings: Any) -> Recipe:
    return recipe_of(**settings)


def trial(**values: Any) -> Recipe:
    return recipes.with_values(recipe_of(), {"sweep": None} | values)


def admit(places: Places, number: int, recipe: Recipe, *, alone: bool = False) -> str | None:
    return places.hub_of(number) if places.admit(number, recipe, RUN, alone=alone) else None


def test_packs_fill_evenly(processes: Processes) -> None:
    places = Places(sweep(max_concurrent=2, pack_size=2), processes)
    assert [admit(places, number, trial(**{LR: 1e-3})) for number in range(5)] == [
        "hub0",
        "hub1",
        "hub0",
        "hub1",
        None,
    ]
    assert processes.rooms == {"hub0": 2, "hub1": 2}
    assert not places.open
    assert places.leave(1, RUN)
    assert processes.left == ["hub1"]
    assert places.open
    assert admit(places, 5, trial(**{LR: 1e-2})) == "hub1"


def test_packs_are_started_before_their_trials_are_asked_for(processes: Processes) -> None:
    places = Places(sweep(max_concurrent=2, pack_size=2), processes)
    places.prepare(RUN, 1)
    assert processes.rooms == {"hub0": 2}  # one trial is left: one pack
    processes.alive.clear()  # it has not come up yet
    assert [admit(places, number, trial()) for number in range(3)] == ["hub0", "hub1", "hub0"]
    assert processes.rooms == {"hub0": 2, "hub1": 2}


@pytest.mark.parametrize(("size", "values"), [(1, {}), (4, {RANK: 0, SYNC: "merge"})])
def test_nothing_is_started_for_trials_that_share_nothing(
    size: int, values: dict[str, Any], processes: Processes
) -> None:
    recipe = recipes.with_values(sweep(max_concurrent=1, pack_size=size), values)
    Places(recipe, processes).prepare(RUN, 8)
    assert processes.rooms == {}


@pytest.mark.parametrize("values", [{RANK: 0, SYNC: "merge"}, {DROPOUT: 0.1}, {SYNC: "merge"}])
def test_what_cannot_share_gets_a_process_of_its_own(
    values: dict[str, Any], processes: Processes
) -> None:
    places = Places(sweep(max_concurrent=1, pack_size=4), processes)
    assert admit(places, 0, trial()) == "hub0"
    assert admit(places, 1, trial(**values)) is None  # the pack is at its place
    assert admit(places, 2, trial()) == "hub0"
    places.leave(0, RUN)
    places.leave(2, RUN)
    assert admit(places, 1, trial(**values)) == "hub1"
    assert processes.rooms["hub1"] == 1
    assert processes.alive == {"hub1"}
    assert admit(places, 3, trial()) is None
    assert not places.leave(1, RUN)
    assert admit(places, 3, trial()) == "hub2"


def test_another_base_or_engine_is_another_pack(processes: Processes) -> None:
    places = Places(sweep(max_concurrent=2, pack_size=4), processes)
    other = trial(**{"generator.backend": "transformers"})
    assert [
        admit(places, n, recipe) for n, recipe in enumerate([trial(), other, trial(), other])
    ] == ["hub0", "hub1", "hub0", "hub1"]
    places.leave(1, RUN)
    places.leave(3, RUN)
    assert (
        admit(places, 4, trial()) == "hub2"
    )  # the emptiest place, though its process was for others
    assert "hub1" not in processes.alive


def test_nobody_joins_a_pack_whose_process_died(processes: Processes) -> None:
    places = Places(sweep(max_concurrent=1, pack_size=3), processes)
    for number in range(2):
        admit(places, number, trial())
    processes.close("hub0")
    assert places.leave(0, RUN)
    assert admit(places, 2, trial()) is None
    assert not places.open
    assert places.leave(1, RUN)
    assert admit(places, 0, trial(), alone=True) == "hub1"
    assert processes.rooms["hub1"] == 1
    assert not places.leave(0, RUN)
    assert admit(places, 2, trial()) == "hub2"


def test_one_after_the_other_they_keep_a_process(processes: Processes) -> None:
    places = Places(sweep(max_concurrent=1, pack_size=1), processes)
    for number in range(2):
        assert admit(places, number, trial()) == "hub0"
        assert not places.leave(number, RUN)


def test_without_hubs_each_has_its_own_process() -> None:
    places = Places(sweep(max_concurrent=2, pack_size=1), None)
    assert [places.admit(number, trial(), RUN, alone=False) for number in range(3)] == [
        True,
        True,
        False,
    ]
    assert places.hub_of(0) is None
