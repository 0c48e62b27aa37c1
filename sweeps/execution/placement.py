"""Where a sweep's trials train: so many places, each with one pack or with one trial alone. Knows
nothing of Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from rltrain.distributed.placement import pack_key, shares_base, uses_gpus
from sweeps.study.trials import packs_at_once, trials_per_place


class Hubs(Protocol):
    """The processes that hold packs, by name."""

    def open(self, name: str, run_dir: RunDir, room: int) -> None:
        """Start a process for trials like this one, with room for so many at a time."""

    def lives(self, name: str) -> bool:
        """Whether a process is there to train in."""

    def leave(self, name: str, run_dir: RunDir) -> None:
        """Take a trial out of its pack, if it is still in it."""

    def close(self, name: str) -> None:
        """End a process, if it is still there."""


@dataclass
class Place:
    """Room for one process: which one is there, what its trials share (None: it is one trial's),
    and who they are.

    A process that is `new` has had no trial yet, and need not have come up.
    """

    hub: str | None = None
    new: bool = True
    key: object = None
    room: int = 1
    trials: set[int] = field(default_factory=set)


class Places:
    """Gives trials their places: in a pack where they can share one, else alone in a process of
    their own.
    """

    def __init__(self, recipe: Recipe, hubs: Hubs | None) -> None:
        """`recipe` is the sweep's; without hubs each trial has a place to itself, and trains in its
        own process.
        """
        self._recipe = recipe
        self._places = [Place() for _ in range(packs_at_once(recipe))]
        self._hubs = hubs
        self._room = trials_per_place(recipe)
        # vLLM does not give all GPU memory back: there, a process for each trial that has no
        # companions.
        self._shares = self._room > 1 or not uses_gpus(recipe)
        self._names = (f"hub{n}" for n in count())

    def prepare(self, run_dir: RunDir, count: int) -> None:
        """Start processes for the packs of so many trials before any is asked for: base and engine
        take a while.

        `run_dir` is the sweep's, whose own recipe says what most of its trials share.
        """
        recipe = self._recipe
        if self._hubs is not None and self._room > 1 and shares_base(recipe):
            for place in self._places[:count]:
                self._prepare(place, self._hubs, run_dir, pack_key(recipe))

    def admit(self, number: int, recipe: Recipe, run_dir: RunDir, *, alone: bool) -> bool:
        """Give a trial a place; False while there is none."""
        shared = self._hubs is not None and self._shares and not alone and shares_base(recipe)
        key = pack_key(recipe) if shared else None
        fitting = [place for place in self._places if self._fits(place, key)]
        if not fitting:
            return False
        # The emptiest, so that all work alike; among those a process that is there already.
        place = min(fitting, key=lambda one: (len(one.trials), one.key is None or one.key != key))
        if self._hubs is not None and not place.trials:
            self._prepare(place, self._hubs, run_dir, key)
        place.trials.add(number)
        return True

    def hub_of(self, number: int) -> str | None:
        """The process that trains a trial; None for its own."""
        return self._of(number).hub

    def leave(self, number: int, run_dir: RunDir) -> bool:
        """A trial has ended; whether it had, or might have had, companions."""
        place = self._of(number)
        place.trials.remove(number)
        place.new = False
        in_a_pack = place.room > 1
        if self._hubs is not None and place.hub is not None:
            if self._hubs.lives(place.hub):
                self._hubs.leave(place.hub, run_dir)
            else:
                place.key = (
                    None  # nobody new comes; those that are still in it are about to end as well
                )
        return in_a_pack

    @property
    def open(self) -> bool:
        """Whether there may be a place for a trial not seen yet."""
        return any(
            not one.trials or (one.key is not None and len(one.trials) < one.room)
            for one in self._places
        )

    def _of(self, number: int) -> Place:
        return next(place for place in self._places if number in place.trials)

    def _fits(self, place: Place, key: object) -> bool:
        return not place.trials or (
            key is not None and place.key == key and len(place.trials) < place.room
        )

    def _prepare(self, place: Place, hubs: Hubs, run_dir: RunDir, key: object) -> None:
        """Have a process in an empty place that this trial can train in: the one that is there, or
        a new one.
        """
        if place.hub is not None:
            if key is not None and place.key == key and (place.new or hubs.lives(place.hub)):
                return
            hubs.close(place.hub)
        place.hub, place.key, place.new = next(self._names), key, True
        place.room = 1 if key is None else self._room
        hubs.open(place.hub, run_dir, place.room)
