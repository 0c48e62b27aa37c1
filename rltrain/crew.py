"""Crew: a pack and the runs in it, which are taken in, trained a step at a time, and let go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.report import Report
from rltrain.trainer import Course, Step, advance


class Crew(Protocol):
    """Who trains a pack's runs: the process that asks, or a group of ranks in step
    (`rltrain.worker_group`).
    """

    contains_failures: bool
    """Whether a run that fails leaves the others going on; if not, a failure is the end of the
    crew.
    """

    def take_in(self, recipe: Recipe, run_dir: RunDir) -> list[Report]:
        """A run joins the pack and is brought to where its training begins; the reports of that."""

    def train(self, run_dirs: Sequence[RunDir]) -> None:
        """One step of these runs; `take` has what came of it, also where one fails."""

    def take(self, run_dir: RunDir) -> Report:
        """A run's report of the step it made, when what is due after it is done; raises what made
        the run fail.
        """

    def let_go(self, run_dir: RunDir) -> None:
        """A run leaves the pack, if it is in it."""


class LocalCrew:
    """This process, with a pack of its own or, on several ranks, its part of one."""

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        # A rank that fails by itself leaves the others waiting for it.
        self.contains_failures = pack.contains_failures = pack.ranks.size == 1
        self._members: dict[Path, Member] = {}
        self._courses: dict[Path, Course] = {}
        self._steps: dict[Member, Step] = {}
        self._failures: dict[Member, Exception] = {}

    def take_in(self, recipe: Recipe, run_dir: RunDir) -> list[Report]:
        """A run joins the pack and is brought to where its training begins; the reports of that."""
        member = self._members[run_dir.path] = self._pack.join(recipe, run_dir)
        course = self._courses[run_dir.path] = Course(self._pack, member)
        return list(course.begin())

    def train(self, run_dirs: Sequence[RunDir]) -> None:
        """One step of these runs; `take` has what came of it, also where one fails."""
        self._steps = advance(self._pack, [self._members[run_dir.path] for run_dir in run_dirs])
        self._failures, self._pack.failures = self._pack.failures, {}

    def take(self, run_dir: RunDir) -> Report:
        """A run's report of the step it made, when what is due after it is done; raises what made
        the run fail.
        """
        member = self._members[run_dir.path]
        if member in self._failures:
            raise self._failures[member]
        return self._courses[run_dir.path].take(self._steps[member])

    def let_go(self, run_dir: RunDir) -> None:
        """A run leaves the pack, if it is in it."""
        self._courses.pop(run_dir.path, None)
        member = self._members.pop(run_dir.path, None)
        if member is not None:
            self._pack.leave(member)

    def close(self) -> None:
        """Give the engine's and the model's memory back."""
        self._pack.close()
