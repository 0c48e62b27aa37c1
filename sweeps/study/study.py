"""The Optuna study on `study.journal`, the truth about a sweep: ask, report, tell, resume."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
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
from sweeps.study.pruner import PrunerView, build_pruner
from sweeps.study.space import Params

STUDY_NAME = "sweep"


@dataclass(frozen=True, slots=True)
class Trial:
    """A run of a sweep: a configuration with one of the seeds.

    `confirm` marks a confirmation run: one of the best configurations on a seed that it was not
    selected by.
    """

    number: int
    configuration: int
    seed: int
    params: Params
    confirm: bool = False

    @property
    def run_dir(self) -> str:
        """The trial's directory, relative to the sweep's."""
        return f"trials/{self.number:04d}"


class Study:
    """A sweep's trials. Each change is a line of the journal, written before it takes effect.

    Attributes:
        stopped: why no further trial starts although some are left.
        outdated: trials that were trained on earlier inputs of the sweep. The sampler, the pruner
            and `best` ignore their results.
    """

    def __init__(self, journal: Path, plan: Plan) -> None:
        """Open the study in a journal file, new or existing.

        Raises UserError when the journal is damaged, or is another sweep's.
        """
        self.plan = plan
        self.stopped: str | None = None
        self.outdated: frozenset[int] = frozenset()
        storage = JournalStorage(Journal(journal))
        self._study = optuna.create_study(
            storage=storage,
            study_name=STUDY_NAME,
            direction=plan.direction,
            sampler=RandomSampler(),
            pruner=build_pruner(plan.recipe),
            load_if_exists=True,
        )
        self._pruner_view = PrunerView(STUDY_NAME, storage, self._study.sampler, self._study.pruner)
        self._check_same()
        self._issued: set[int] = set()

    def trials(self) -> list[FrozenTrial]:
        """Return Optuna's record of every trial, by number."""
        return self._study.get_trials(deepcopy=False)

    def search_trials(self) -> list[FrozenTrial]:
        """Return all trials except confirmation runs, which nothing learns from or selects."""
        return [record for record in self.trials() if not record.user_attrs.get("confirm")]

    def describe(self, number: int) -> Trial:
        """Return what a trial runs."""
        record = self.trials()[number]
        attrs = record.user_attrs
        confirm = attrs.get("confirm", False)
        return Trial(number, attrs["configuration"], attrs["seed"], self._params(record), confirm)

    def counts(self) -> Counter[str]:
        """Return the number of trials by state: RUNNING, COMPLETE, PRUNED, FAIL."""
        return Counter(record.state.name for record in self.trials())

    @property
    def num_to_confirm(self) -> int:
        """How many of the best configurations run again on fresh seeds after the other trials."""
        return int(self._study.user_attrs.get("confirm", 0))

    def confirm_best(self, count: int) -> None:
        """Set `num_to_confirm`; the journal keeps it for a resumed sweep."""
        if count != self.num_to_confirm:
            self._study.set_user_attr("confirm", count)

    @property
    def num_left(self) -> int:
        """Runs that are running or have not started.

        Confirmation runs count once it is known which they are.
        """
        not_started = self.plan.num_runs - len(self.search_trials()) + len(self._to_confirm())
        return self.counts()["RUNNING"] + not_started

    @property
    def num_runs(self) -> int:
        """Runs that have ended, and `num_left`."""
        return len(self.trials()) - self.counts()["RUNNING"] + self.num_left

    @property
    def exhausted(self) -> bool:
        """Whether the space has no untried configuration left although the recipe asks for more."""
        configurations, started = divmod(len(self.search_trials()), len(self.plan.sweep.seeds))
        if started or configurations >= self.plan.num_configurations:
            return False
        return propose(self.plan, self._history()) is None

    @property
    def finished(self) -> bool:
        """Whether every trial has ended and none is left to start."""
        return not self.counts()["RUNNING"] and self._next() is None

    @property
    def best(self) -> tuple[Trial, float] | None:
        """The complete trial with the best value so far, and the value."""
        done = [
            (record.value, record.number)
            for record in self.search_trials()
            if record.state is TrialState.COMPLETE
            and record.value is not None
            and record.number not in self.outdated
        ]
        if not done:
            return None
        value, number = min(done, key=lambda pair: (self._sign * pair[0], pair[1]))
        return self.describe(number), value

    def ask(self) -> Trial | None:
        """Return the next trial, in state RUNNING, or None when none can start.

        Trials that an earlier process left RUNNING come first. New ones are numbered configuration
        by configuration, each with every seed; confirmation runs come last.
        """
        trials = self.trials()
        interrupted = (
            r.number
            for r in trials
            if r.state is TrialState.RUNNING and r.number not in self._issued
        )
        number = next(interrupted, len(trials))
        if number == len(trials):
            trial = self._next()
            if trial is None:
                return None
            attrs: dict[str, Any] = {
                "configuration": trial.configuration,
                "seed": trial.seed,
                "run_dir": trial.run_dir,
            }
            if trial.confirm:
                attrs["confirm"] = True
            # One line of the journal: a kill leaves a trial with all its parameters, or none.
            self._study.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=self.plan.space.encode_all(trial.params),
                    distributions=dict(self.plan.space.distributions),
                    user_attrs=attrs,
                )
            )
        self._issued.add(number)
        return self.describe(number)

    def report(self, number: int, step: int, value: float) -> str | None:
        """Record an evaluation.

        Returns:
            Where the pruner stops the trial, which is then PRUNED, the reason; else None.
        """
        record = self.trials()[number]
        if (
            not math.isfinite(value)
            or record.state.is_finished()
            or record.user_attrs.get("confirm")
        ):
            return None
        late_restart = record.user_attrs.get("behind")
        self._pruner_view.excluded = self.outdated
        self._pruner_view.still_running = frozenset()
        if late_restart:
            running = _running_at(late_restart, step, len(self.trials()))
            self._pruner_view.still_running = running
        trial = optuna.trial.Trial(self._pruner_view, record._trial_id)
        # A resumed trial repeats evaluations that it had reported before the kill.
        if step not in record.intermediate_values:
            trial.report(value, step)
        if not trial.should_prune():
            return None
        reason = (
            f"pruned at step {step}: {self.plan.sweep.metric} {value:.4g} by "
            f"{type(self._study.pruner).__name__}"
        )
        reason += ", alone after its pack's process had died" if late_restart else ""
        self._finish(number, TrialState.PRUNED, reason=reason)
        return reason

    def note_late_restart(
        self, number: int, step: int, steps_left: Mapping[int, int | None]
    ) -> None:
        """Note that a trial will resume from `step` alone, later than the other running trials.

        From then on the pruner compares it with what it would have seen without the delay.
        `steps_left` are the steps that each other running trial still has to take, None where that
        is unknown. Trials are assumed to take a step in equal time, so that the pruner's decision
        does not depend on how long each waits for a slot.
        """
        ends = {
            str(other): None if left is None else step + left for other, left in steps_left.items()
        }
        attributes = {"begun": len(self.trials()), "ends": ends}
        optuna.trial.Trial(self._study, self.trials()[number]._trial_id).set_user_attr(
            "behind", attributes
        )

    def complete(self, number: int, value: float | None, step: int) -> str | None:
        """Record the final value of a trial.

        Returns:
            Where the value is missing or not finite, which is a failure, the reason; else None.
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

    def _next(self) -> Trial | None:
        """Return the trial after the existing ones; None when none is left or can be known yet."""
        seeds, searched, number = self.plan.sweep.seeds, self.search_trials(), len(self.trials())
        configuration, seed_index = divmod(len(searched), len(seeds))
        if seed_index:
            params: Params | None = self._params(searched[-1])
        else:
            params = propose(self.plan, self._history())
        if params is not None:
            return Trial(number, configuration, seeds[seed_index], params)
        if not all(record.state.is_finished() for record in searched):
            return None
        to_confirm = self._to_confirm()
        if not to_confirm:
            return None
        configuration, seed = to_confirm[0]
        params = self._params(searched[configuration * len(seeds)])
        return Trial(number, configuration, seed, params, confirm=True)

    def _to_confirm(self) -> list[tuple[int, int]]:
        """Return the best configurations with each fresh seed that they have no trial for."""
        attrs = [record.user_attrs for record in self.trials()]
        existing = {(a["configuration"], a["seed"]) for a in attrs if a.get("confirm")}
        pairs = (
            (configuration, seed)
            for configuration in self._best_configurations()
            for seed in self.plan.fresh_seeds
        )
        return [pair for pair in pairs if pair not in existing]

    def _best_configurations(self) -> list[int]:
        """Return the configurations to confirm: those with the best mean over all their seeds."""
        means = []
        for configuration, trials in enumerate(self._by_configuration()):
            values = [
                record.value
                for record in trials
                if record.state is TrialState.COMPLETE
                and record.value is not None
                and record.number not in self.outdated
            ]
            if len(values) == len(self.plan.sweep.seeds):
                means.append((self._sign * statistics.fmean(values), configuration))
        return [configuration for _, configuration in sorted(means)[: self.num_to_confirm]]

    def _history(self) -> list[Observation]:
        """Return an observation per configuration: samplers learn from means over its seeds."""
        return [
            Observation(self._params(trials[0]), TrialState.FAIL)
            if any(record.number in self.outdated for record in trials)
            else _observation(self.plan, trials)
            for trials in self._by_configuration()
        ]

    def _by_configuration(self) -> list[list[FrozenTrial]]:
        """Return the trials of each configuration, without confirmation runs."""
        size, trials = len(self.plan.sweep.seeds), self.search_trials()
        return [trials[i : i + size] for i in range(0, len(trials), size)]

    def _params(self, record: FrozenTrial) -> Params:
        return self.plan.space.decode_all(record.params)

    @property
    def _sign(self) -> int:
        """What to multiply values by, so that less is better."""
        return -1 if self.plan.direction == "maximize" else 1

    def _check_same(self) -> None:
        """Raise UserError where the plan differs from the study's in what a sweep cannot change."""
        plan, stored = self.plan, self._study.user_attrs
        current: dict[str, Any] = {
            "space_hash": plan.space.hash,
            "space": {axis.key: f"{axis.kind}: {axis.describe()}" for axis in plan.space.axes},
            "metric": plan.sweep.metric,
            "seeds": plan.sweep.seeds,
        }
        changes = [
            f"sweep.{name}: {stored[name]} -> {current[name]}"
            for name in ("metric", "seeds")
            if stored.get(name, current[name]) != current[name]
        ]
        if stored.get("space_hash", current["space_hash"]) != current["space_hash"]:
            old, new = stored.get("space", {}), current["space"]
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
        for name, value in current.items():
            if name not in stored:
                self._study.set_user_attr(name, value)


def _running_at(late_restart: dict[str, Any], step: int, num_trials: int) -> frozenset[int]:
    """Return the trials that would still run when a trial was at a step, had it not been delayed.

    `late_restart` is what `Study.note_late_restart` recorded; trials that started since count too.
    """
    ends = {int(number): end for number, end in late_restart["ends"].items()}
    # One more step: of two trials in a pack, one may have logged it when their process died.
    running = {number for number, end in ends.items() if end is None or step <= end + 1}
    return frozenset(running | set(range(late_restart["begun"], num_trials)))


def _observation(plan: Plan, trials: Sequence[FrozenTrial]) -> Observation:
    """Return what is known of the configuration of these trials."""
    params = plan.space.decode_all(trials[0].params)
    by_state = {state: [t for t in trials if t.state is state] for state in TrialState}
    complete, pruned = by_state[TrialState.COMPLETE], by_state[TrialState.PRUNED]
    if pruned:
        # A pruned seed has no final value, and without it the mean would be too good.
        return Observation(
            params, TrialState.PRUNED, pruned[0].value, dict(pruned[0].intermediate_values)
        )
    if complete:
        values = [t.value for t in complete if t.value is not None]
        return Observation(params, TrialState.COMPLETE, sum(values) / len(values))
    running = by_state[TrialState.RUNNING] or len(trials) < len(plan.sweep.seeds)
    return Observation(params, TrialState.RUNNING if running else TrialState.FAIL)
