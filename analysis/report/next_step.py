"""Choose the next experiment to run, and its command."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.report import next_sweep
from analysis.report.decisions import UNTESTED, Decision
from harness.records.run_dir import Status

# At most this many of the best configurations are run again.
MOST_CONFIRMED = 5


@dataclass(frozen=True, slots=True)
class NextStep:
    """Why an experiment is the next to run, and the command that runs it, where there is one."""

    why: str
    command: str | None


def next_step(experiment: Experiment, decisions: list[Decision]) -> NextStep:
    """Return the next experiment.

    In this order: trials that complete, a best rate inside the tested range, the best
    configurations told apart, the open questions, the questions that were not tested.
    """
    if not experiment.finished:
        what = "sweep" if experiment.is_sweep else "run"
        return NextStep(f"Wait: the {what} has not ended, and its answer may change.", None)
    if not decisions:
        return _none_complete(experiment)
    rate = next((choice for choice in decisions if choice.question == "Which learning rate?"), None)
    if not experiment.is_sweep:
        first = rate or decisions[0]
        return NextStep(f"A single run compares nothing. {first.next}", first.command)
    if rate is not None and rate.at_edge:
        why = f"The winner's learning rate is the last tested on its side. {rate.next}"
        return NextStep(why, rate.command)
    comparison = experiment.comparison
    near = len(comparison.others) - len(comparison.of("worse")) if comparison is not None else 0
    if near and not experiment.tables.runs["confirm"].fillna(False).any():
        count = min(near + 1, MOST_CONFIRMED)
        why = (
            f"{near + 1} configurations are not told apart. Run the best {count} again on fresh "
            "seeds."
        )
        return NextStep(why, next_sweep.confirm(experiment, count))
    for verdict, why in (("open", "is left open"), (UNTESTED, "was not tested")):
        for decision in decisions:
            if decision.verdict == verdict:
                return NextStep(f'"{decision.question}" {why}. {decision.next}', decision.command)
    return NextStep(
        "Every question asked here is settled. A longer run, or another task, would tell more.",
        None,
    )


def _none_complete(experiment: Experiment) -> NextStep:
    """Say what keeps the runs from a first answer."""
    runs = experiment.tables.runs
    reasons = runs.loc[runs["status"] == Status.FAILED.value, "reason"].dropna()
    if experiment.is_sweep and (runs["status"] == Status.COMPLETE.value).any():
        why = "No configuration has all its seeds complete. Run the sweep again."
    elif reasons.empty:
        why = "Nothing has completed, so there is nothing to compare. Run it again."
    else:
        common = str(reasons.value_counts().index[0])
        why = (
            f"Nothing has completed: {len(reasons)} of {labels.plural(len(runs), 'run')} failed, "
            f"most often with: {common[:200]}. Fix that, then run it again."
        )
    if experiment.is_sweep:
        return NextStep(why, next_sweep.again(experiment, experiment.seeds))
    return NextStep(why, experiment.command("."))
