"""The next experiment to run: what matters most among what is left open, and its command."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.data import commands as rerun
from analysis.data import labels
from analysis.experiment import Experiment
from analysis.report import next_sweep
from analysis.report.decisions import UNTESTED, Decision, Verdict
from harness.records.run_dir import Status

# As many of the best are run again at most.
MOST_CONFIRMED = 5


@dataclass(frozen=True, slots=True)
class Next:
    """Why an experiment is the next to run, and the command that runs it, where there is one."""

    why: str
    command: str | None


def next_step(experiment: Experiment, decisions: list[Decision]) -> Next:
    """The next experiment: trials that work, rates within the tested, the best told apart, then the
    other questions.
    """
    if not experiment.finished:
        what = "sweep" if experiment.is_sweep else "run"
        return Next(f"Wait: the {what} has not ended, and its answer may change.", None)
    if not decisions:
        return _none_complete(experiment)
    rate = next((one for one in decisions if one.question == "Which learning rate?"), None)
    if not experiment.is_sweep:
        first = rate or decisions[0]
        return Next(f"One run compares nothing. {first.next}", first.command)
    if rate is not None and rate.at_edge:
        return Next(
            f"The winner's learning rate is the last tested on its side. {rate.next}", rate.command
        )
    ranking = experiment.ranking
    confirmed = bool(experiment.tables.runs["confirm"].fillna(False).any())
    if (
        ranking is not None
        and not confirmed
        and (near := len(ranking.others) - len(ranking.of("worse")))
    ):
        count = min(near + 1, MOST_CONFIRMED)
        why = (
            f"{near + 1} configurations are not told apart. Run the best {count} again "
            "on fresh seeds."
        )
        return Next(why, next_sweep.confirm(experiment, count))
    asked: dict[Verdict, str] = {"open": "is left open", UNTESTED: "was not asked"}
    for verdict, why in asked.items():
        found = next((one for one in decisions if one.verdict == verdict), None)
        if found is not None:
            return Next(f'"{found.question}" {why}. {found.next}', found.command)
    return Next(
        "Every question asked here is settled: a longer run, or another task, is what "
        "would tell more.",
        None,
    )


def _none_complete(experiment: Experiment) -> Next:
    """What stands in the way of a first answer."""
    runs = experiment.tables.runs
    reasons = runs.loc[runs["status"] == Status.FAILED.value, "reason"].dropna()
    if experiment.is_sweep and (runs["status"] == Status.COMPLETE.value).any():
        why = "No configuration has all its seeds complete. Run the sweep again."
    elif reasons.empty:
        why = "Nothing has completed, so there is nothing to compare. Run it again."
    else:
        common = str(reasons.value_counts().index[0])
        times = f"{len(reasons)} of {labels.plural(len(runs), 'run')} failed, "
        why = (
            f"Nothing has completed: {times}most often with: {common[:200]}. Mend that, "
            "then run it again."
        )
    return Next(
        why,
        next_sweep.again(experiment, experiment.seeds)
        if experiment.is_sweep
        else rerun.command(experiment, "."),
    )
