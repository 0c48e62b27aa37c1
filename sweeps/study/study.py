"""The Optuna study on `study.journal`, the truth about a sweep: ask, report, tell, resume."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from harness.core.errors import UserError
from sweeps.study.journal import Journal
from sweeps.study.plan import Observation, Plan, propose
from sweeps.study.pruner import build_pruner
from sweeps.study.space import Params

STUDY_NAME = "sweep"


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep: a configuration with one of the seeds. `run_dir` is relative to the
    sweep's directory.

    `confirm`: a leading configuration again, on a seed that had no part in its being chosen.
    """

    number: int
    configuration: int
    seed: int
    params: Params
    run_dir: str
    confirm: bool = False


class Study:
    """A sweep's trials. Every change is one line of the journal, written before anything acts on
    it.
    """

    def __init__(self, journal: Path, plan: Plan) -> None:
        """Open the study in a journal file, new or existing; UserError when it is damaged or
        another sweep's.
        """
        self.plan = plan
        self.stopped: str | None = None
        """Why no further trial is begun although some are left."""
        self.former: frozenset[int] = frozenset()
        """Trials on former inputs, which sampler, pruner and the choice of the best leave out."""
        storage = JournalStorage(Journal(journal))
        self._study = optuna.create_study(
            storage=storage,
            study_name=STUDY_NAME,
            direction=plan.direction,
            sampler=RandomSampler(),
            pruner=build_pruner(plan.recipe),
            load_if_exists=True,
        )
        self._swept = _Swept(STUDY_NAME, storage, self._study.sampler, self._study.pruner)
        self._check_same()
        self._issued: set[int] = set()

    def trials(self) -> list[FrozenTrial]:
        """Optuna's record of every trial, by number."""
        return self._study.get_trials(deepcopy=False)

    def swept(self) -> list[FrozenTrial]:
        """Those that sampler and pruner learn from, and the best are chosen from: all but those
        that confirm.
        """
        return [record for record in self.trials() if not record.user_attrs.get("confirm")]

    def describe(self, number: int) -> Trial:
        """What a trial runs."""
        record = self.trials()[number]
        attrs = record.user_attrs
        params = self._decoded(record)
        confirm = attrs.get("confirm", False)
        return Trial(
            number, attrs["configuration"], attrs["seed"], params, attrs["run_dir"], confirm
        )

    def counts(self) -> Counter[str]:
        """Number of trials by state: RUNNING, COMPLETE, PRUNED, FAIL."""
        return Counter(record.state.name for record in self.trials())

    @property
    def num_to_confirm(self) -> int:
        """How many leading configurations are run again on fresh seeds once the sweep's own trials
        have ended.
        """
        return int(self._study.user_attrs.get("confirm", 0))

    def confirm_best(self, count: int) -> None:
        """Have so many leading configurations run again; the journal keeps the number for whoever
        resumes.
        """
        if count != self.num_to_confirm:
            self._study.set_user_attr("confirm", count)

    @property
    def num_left(self) -> int:
        """Runs that have not ended, those not begun included; those that confirm as far as is known
        yet.
        """
        to_come = self.plan.num_runs - len(self.swept()) + len(self._to_confirm())
        return self.counts()["RUNNING"] + to_come

    @property
    def num_runs(self) -> int:
        """Runs that have ended, and those that are left."""
        return len(self.trials()) - self.counts()["RUNNING"] + self.num_left

    @property
    def exhausted(self) -> bool:
        """Whether nothing untried is left although fewer configurations ran than were asked for."""
        configurations, begun = divmod(len(self.swept()), len(self.plan.sweep.seeds))
        if begun or configurations >= self.plan.num_configurations:
            return False
        return propose(self.plan, self._history()) is None

    @property
    def finished(self) -> bool:
        """Whether every trial has ended and none is to come."""
        return not self.counts()["RUNNING"] and self._next() is None

    @property
    def best(self) -> tuple[Trial, float] | None:
        """The complete trial with the best value so far, and the value; those that confirm do not
        compete.
        """
        done = [
            (r.value, r.number)
            for r in self.swept()
            if r.state is TrialState.COMPLETE
            and r.value is not None
            and r.number not in self.former
        ]
        if not done:
            return None
        sign = -1 if self.plan.direction == "maximize" else 1
        value, number = min(done, key=lambda pair: (sign * pair[0], pair[1]))
        return self.describe(number), value

    def ask(self) -> Trial | None:
        """The next trial, marked RUNNING: first those an earlier process left RUNNING; None when
        there is none left.

        Trials are numbered configuration by configuration, each with every seed in turn; those that
        confirm come last.
        """
        trials = self.trials()
        left = (
            r.number
            for r in trials
            if r.state is TrialState.RUNNING and r.number not in self._issued
        )
        number = next(left, len(trials))
        if number == len(trials):
            trial = self._next()
            if trial is None:
                return None
            self._add(trial)
        self._issued.add(number)
        return self.describe(number)

    def report(self, number: int, step: int, value: float) -> str | None:
        """Record an evaluation; the reason when the pruner stops the trial here, which is then
        PRUNED.
        """
        record = self.trials()[number]
        if (
            not math.isfinite(value)
            or record.state.is_finished()
            or record.user_attrs.get("confirm")
        ):
            return None
        self._swept.left_out = self.former
        behind = record.user_attrs.get("behind")
        self._swept.running = (
            _running_still(behind, step, len(self.trials())) if behind else frozenset()
        )
        trial = optuna.trial.Trial(self._swept, record._trial_id)
        # A resumed trial comes by an evaluation again that it had reported before the kill.
        if step not in record.intermediate_values:
            trial.report(value, step)
        if not trial.should_prune():
            return None
        reason = (
            f"pruned at step {step}: {self.plan.sweep.metric} {value:.4g} by "
            f"{type(self._study.pruner).__name__}"
        )
        reason += ", alone after its pack's process had died" if behind else ""
        self._finish(number, TrialState.PRUNED, reason=reason)
        return reason

    def fall_behind(self, number: int, step: int, left: Mapping[int, int | None]) -> None:
        """Have a trial that goes on alone from `step`, later than the others, judged by what it
        would have seen there.

        `left` are the steps that each other running trial still had to make, None where that is not
        known. Equal steps count as equally late, so that what the pruner decides does not depend on
        who has to wait for a place.
        """
        ends = {
            str(other): None if steps is None else step + steps for other, steps in left.items()
        }
        attributes = {"begun": len(self.trials()), "ends": ends}
        optuna.trial.Trial(self._study, self.trials()[number]._trial_id).set_user_attr(
            "behind", attributes
        )

    def complete(self, number: int, value: float | None, step: int) -> str | None:
        """Record the final value; a missing or non-finite one is a failure, whose reason is
        returned.
        """
        metric = self.plan.sweep.metric
        if value is None or not math.isfinite(value):
            reason = (
                f"the run logged no {metric}"
                if value is None
                else f"{metric} is {value} at step {step}"
            )
            self._finish(number, TrialState.FAIL, reason=reason)
            return reason
        record = self.trials()[number]
        if not record.state.is_finished():
            if step not in record.intermediate_values and not record.user_attrs.get("confirm"):
                optuna.trial.Trial(self._study, record._trial_id).report(value, step)
            self._finish(number, TrialState.COMPLETE, value=value)
        return None

    def fail(self, number: int, reason: str) -> None:
        """Record a failure."""
        self._finish(number, TrialState.FAIL, reason=reason)

    def _next(self) -> Trial | None:
        """The trial that comes after all there are; None when none is left, or none is
        known yet.
        """
        seeds, swept, number = self.plan.sweep.seeds, self.swept(), len(self.trials())
        configuration, place = divmod(len(swept), len(seeds))
        params = self._decoded(swept[-1]) if place else propose(self.plan, self._history())
        if params is not None:
            return Trial(number, configuration, seeds[place], params, _run_dir(number))
        waiting = self._to_confirm() if all(record.state.is_finished() for record in swept) else []
        if not waiting:
            return None
        configuration, seed = waiting[0]
        params = self._decoded(swept[configuration * len(seeds)])
        return Trial(number, configuration, seed, params, _run_dir(number), confirm=True)

    def _to_confirm(self) -> list[tuple[int, int]]:
        """Leading configurations with the fresh seeds that they have not been given yet."""
        attrs = [record.user_attrs for record in self.trials()]
        given = {(one["configuration"], one["seed"]) for one in attrs if one.get("confirm")}
        wanted = [
            (configuration, seed)
            for configuration in self._leading()
            for seed in self.plan.fresh_seeds
        ]
        return [one for one in wanted if one not in given]

    def _leading(self) -> list[int]:
        """The best configurations so far by the mean of all their seeds, as many as are to be
        confirmed.
        """
        size, swept = len(self.plan.sweep.seeds), self.swept()
        parts = [swept[i : i + size] for i in range(0, len(swept), size)]
        values = [
            [
                r.value
                for r in part
                if r.state is TrialState.COMPLETE
                and r.value is not None
                and r.number not in self.former
            ]
            for part in parts
        ]
        sign = -1 if self.plan.direction == "maximize" else 1
        ranked = sorted(
            (sign * statistics.fmean(v), place) for place, v in enumerate(values) if len(v) == size
        )
        return [place for _, place in ranked[: self.num_to_confirm]]

    def _decoded(self, record: FrozenTrial) -> Params:
        return self.plan.space.decode_all(record.params)

    def _add(self, trial: Trial) -> None:
        attrs = {"configuration": trial.configuration, "seed": trial.seed, "run_dir": trial.run_dir}
        # Whole in one line of the journal: a kill leaves a trial with all its parameters, or none.
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=self.plan.space.encode_all(trial.params),
                distributions=dict(self.plan.space.distributions),
                user_attrs=attrs | ({"confirm": True} if trial.confirm else {}),
            )
        )

    def _finish(
        self,
        number: int,
        state: TrialState,
        *,
        reason: str | None = None,
        value: float | None = None,
    ) -> None:
        record = self.trials()[number]
        if record.state.is_finished():
            return
        if reason is not None:
            optuna.trial.Trial(self._study, record._trial_id).set_user_attr("reason", reason)
        self._study.tell(number, value, state)

    def _history(self) -> list[Observation]:
        """One observation per configuration, so that a sampler learns from means over seeds, not
        from lucky ones.
        """
        size, trials = len(self.plan.sweep.seeds), self.swept()
        parts = [trials[i : i + size] for i in range(0, len(trials), size)]
        return [
            Observation(self._decoded(part[0]), TrialState.FAIL)
            if any(record.number in self.former for record in part)
            else _observation(self.plan, part)
            for part in parts
        ]

    def _check_same(self) -> None:
        """Hold what must not change against what the study was begun with."""
        plan, known = self.plan, self._study.user_attrs
        now: dict[str, Any] = {
            "space_hash": plan.space.hash,
            "space": plan.space.describe(),
            "metric": plan.sweep.metric,
            "seeds": plan.sweep.seeds,
        }
        changes = [
            f"sweep.{name}: {known[name]} -> {now[name]}"
            for name in ("metric", "seeds")
            if known.get(name, now[name]) != now[name]
        ]
        if known.get("space_hash", now["space_hash"]) != now["space_hash"]:
            old, new = known.get("space", {}), now["space"]
            changes += [
                f"{key}: {old.get(key, 'no axis')} -> {new.get(key, 'no axis')}"
                for key in dict.fromkeys([*old, *new])
                if old.get(key) != new.get(key)
            ]
        if changes:
            raise UserError(
                "the sweep to resume is another one",
                got="; ".join(changes),
                fix="undo the change, or start a new sweep under another trainer.run_name",
            )
        for name, value in now.items():
            if name not in known:
                self._study.set_user_attr(name, value)


class _Swept(optuna.Study):
    """The study as the pruner sees it: without the trials that confirm, and those on
    former inputs.
    """

    left_out: frozenset[int] = frozenset()

    running: frozenset[int] = frozenset()
    """Trials that count as running, although they may have ended."""

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        out = (
            self.left_out
            if states is None or TrialState.RUNNING in states
            else self.left_out | self.running
        )
        found = super().get_trials(deepcopy, states)
        return [t for t in found if not t.user_attrs.get("confirm") and t.number not in out]


def _running_still(behind: dict[str, Any], step: int, count: int) -> frozenset[int]:
    """Of `count` trials, those that would not have ended when one that fell behind was at
    a step.
    """
    ends = {int(number): end for number, end in behind["ends"].items()}
    # Of two trials of a pack one may have logged a step that the other had not when their process
    # died.
    running = {number for number, end in ends.items() if end is None or step <= end + 1}
    return frozenset(running | set(range(behind["begun"], count)))


def _run_dir(number: int) -> str:
    return f"trials/{number:04d}"


def _observation(plan: Plan, trials: Sequence[FrozenTrial]) -> Observation:
    params = plan.space.decode_all(trials[0].params)
    by_state = {state: [t for t in trials if t.state is state] for state in TrialState}
    complete, pruned = by_state[TrialState.COMPLETE], by_state[TrialState.PRUNED]
    if pruned:
        # One seed that was stopped early has no final value: the mean of the others would flatter
        # the configuration.
        return Observation(
            params, TrialState.PRUNED, pruned[0].value, dict(pruned[0].intermediate_values)
        )
    if complete:
        values = [t.value for t in complete if t.value is not None]
        return Observation(params, TrialState.COMPLETE, sum(values) / len(values))
    running = by_state[TrialState.RUNNING] or len(trials) < len(plan.sweep.seeds)
    return Observation(params, TrialState.RUNNING if running else TrialState.FAIL)
