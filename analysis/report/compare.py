"""Compare several runs or sweeps: the best of each, and the leader on the others' problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.report import answer
from analysis.report.tables import Column, Table, duration, integer, number, score
from analysis.stats.effects import ALPHA
from analysis.stats.paired import Paired, final_rewards, paired_difference


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """The first's winner less the second's over problems, with its 95% interval; empty if none."""

    first: str
    second: str
    difference: str
    interval: str
    problems: int
    seeds: int
    verdict: Literal["better", "worse", "cannot tell", "not comparable"]
    reading: str


def unique_names(experiments: Sequence[Experiment]) -> list[str]:
    """Return a name for each: its own, or its directory where several have the same name."""
    names = [experiment.name for experiment in experiments]
    return [
        name if names.count(name) == 1 else experiment.directory
        for name, experiment in zip(names, experiments, strict=True)
    ]


def best_of_each(experiments: Sequence[Experiment]) -> Table:
    """Return a row per experiment: its winner, score with interval, base, and cost of a run."""
    named = zip(unique_names(experiments), experiments, strict=True)
    rows = pd.DataFrame([_row(name, experiment) for name, experiment in named])
    titles = {labels.metric(experiment.metric) for experiment in experiments}
    columns = [
        Column("sweep", lambda row: row["name"], words=True),
        Column("winner", lambda row: row["winner"] or "no winner", words=True),
        score(titles.pop() if len(titles) == 1 else "score", "score"),
        score("expected when run again", "expected"),
        Column("95% interval", lambda row: row["interval"], sort=number("score")),
        score("base", "base"),
        integer("parameters", "parameters", ","),
        Column("time a run", lambda row: duration(row["seconds"]), sort=number("seconds")),
        integer("trials", "trials"),
    ]
    if any(experiment.inputs_changed for experiment in experiments):
        columns.append(Column("inputs", lambda row: row["inputs"], words=True))
    leader = _leader(experiments)
    return Table.of(columns, rows, lambda row: row.name == leader, lambda row: not row["winner"])


def _row(name: str, experiment: Experiment) -> dict[str, object]:
    row, trial, held = experiment.winner_row(), experiment.best_trial(), experiment.expected
    winner, interval = "", None
    if trial is not None:
        winner = labels.settings(answer.settings_of(experiment, trial))
        interval = answer.winner_interval(experiment)
    known = row is not None and trial is not None
    changed = known and experiment.inputs_changed
    return {
        "name": name,
        "metric": experiment.metric,
        "status": experiment.source["status"],
        "winner": winner,
        "score": _best_score(experiment) if known else None,
        "expected": None if held is None else held.estimate.value,
        "interval": labels.score_range(experiment.metric, *interval) if interval else "–",
        "base": experiment.base,
        "parameters": None if row is None else row["parameters"],
        "seconds": None if row is None else row["seconds"],
        "trials": len(experiment.trials),
        "inputs": str(row["inputs"]) if row is not None and changed else "–",
    }


def pairs(experiments: Sequence[Experiment]) -> list[PairedComparison]:
    """Compare the leading winner with each other's, on problems that both kept samples of."""
    leader = _leader(experiments)
    if leader is None:
        return []
    names = unique_names(experiments)
    return [
        _pair(names[leader], names[other], experiments[leader], experiments[other])
        for other in range(len(experiments))
        if other != leader
    ]


def _pair(name: str, against: str, first: Experiment, second: Experiment) -> PairedComparison:
    paired, why = None, f"{against} has no winner."
    if first.metric != second.metric:
        metrics = labels.metric(first.metric), labels.metric(second.metric)
        why = f"{name} is judged by {metrics[0]}, {against} by {metrics[1]}."
    elif second.winner_row() is not None:
        paired = _on_shared_problems(_winner_rewards(first), _winner_rewards(second))
        why = (
            "They kept no samples of the same held-out problems (trainer.samples_per_dump): only "
            "their scores compare."
        )
    if paired is None:
        return PairedComparison(name, against, "", "", 0, 0, "not comparable", why)
    low, high = paired.effect.interval(ALPHA / 2)
    verdict: Literal["better", "worse", "cannot tell"] = "cannot tell"
    says = "these problems do not tell the two apart"
    if low > 0:
        verdict, says = "better", f"{name} answers more of them right"
    elif high < 0:
        verdict = "worse"
        says = f"{against} answers more of them right, though {name} has the better score"
    seeds = "one seed each, or the mean over seeds"
    if paired.seeds > 1:
        seeds = f"{labels.plural(paired.seeds, 'seed')} each"
    span = f"{low:+.3f} to {high:+.3f}"
    return PairedComparison(
        first=name,
        second=against,
        difference=f"{paired.effect.value:+.3f} reward",
        interval=span,
        problems=paired.problems,
        seeds=paired.seeds,
        verdict=verdict,
        reading=(
            f"On {labels.plural(paired.problems, 'problem')} that both answered ({seeds}) the "
            f"rewards differ by {paired.effect.value:+.3f} on average ({span}): {says}. This "
            "interval does not contain chance in training."
        ),
    )


def _winner_rewards(experiment: Experiment) -> pd.DataFrame:
    """Return the best configuration's rewards per problem and seed, with each problem's text."""
    row, samples = experiment.winner_row(), experiment.tables.samples
    if row is None or samples.empty:
        return pd.DataFrame(columns=["index", "seed", "reward", "question"])
    runs = experiment.tables.runs
    if experiment.is_sweep:
        chosen = (runs["configuration"] == row["configuration"]) & runs["score"].notna()
        runs = runs[chosen & ~runs["confirm"].astype(bool)]
    kept = samples[samples["run_dir"].isin(runs["run_dir"]) & (samples["phase"] == "eval")]
    texts = kept.dropna(subset="question").drop_duplicates("index").set_index("index")["question"]
    rewards = final_rewards(kept)
    return rewards.assign(question=rewards["index"].map(texts))


def _on_shared_problems(first: pd.DataFrame, second: pd.DataFrame) -> Paired | None:
    """Return the difference on problems with equal texts; without shared seeds, of the means."""
    if first.empty or second.empty:
        return None
    texts = (
        part.drop_duplicates("index").set_index("index")["question"] for part in (first, second)
    )
    both = pd.concat(texts, axis=1, join="inner", keys=["first", "second"])
    same = both.index[both["first"] == both["second"]]
    parts = [part[part["index"].isin(same)] for part in (first, second)]
    if not set(parts[0]["seed"]) & set(parts[1]["seed"]):
        means = (part.groupby("index")["reward"].mean().reset_index() for part in parts)
        parts = [mean.assign(seed=0) for mean in means]
    return paired_difference(*parts)


def _leader(experiments: Sequence[Experiment]) -> int | None:
    """Return the index of the best score, among those judged by the first winner's metric."""
    won = [place for place, one in enumerate(experiments) if one.winner_row() is not None]
    if not won:
        return None
    first = experiments[won[0]]
    scores = {
        place: _best_score(experiments[place])
        for place in won
        if experiments[place].metric == first.metric
    }
    choose = max if first.direction == "maximize" else min
    return choose(scores, key=lambda place: scores[place])


def _best_score(experiment: Experiment) -> float:
    """Return the best configuration's score, or the run's."""
    if experiment.best is not None and experiment.is_sweep:
        return experiment.best.score
    return float(experiment.complete[experiment.metric].iloc[0])
