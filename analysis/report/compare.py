"""Several runs or sweeps beside each other: the best of each, and how two of these did on the same
problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from analysis.data import labels
from analysis.experiment import Experiment
from analysis.report import answer as reading
from analysis.report import tables
from analysis.report.decisions import winner_row
from analysis.stats.effects import ALPHA
from analysis.stats.paired import Paired, outcomes, paired_difference
from harness.config import metrics

Verdict = Literal["better", "worse", "cannot tell", "not comparable"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The first's winner less the second's, problem by problem, with its 95% interval; empty where
    there is none.
    """

    first: str
    second: str
    difference: str
    interval: str
    problems: int
    seeds: int
    verdict: Verdict
    reading: str


def names(experiments: Sequence[Experiment]) -> list[str]:
    """A name for each that no other has: its own, else its directory."""
    given = [experiment.name for experiment in experiments]
    return [
        name if given.count(name) == 1 else experiment.directory
        for name, experiment in zip(given, experiments, strict=True)
    ]


def best_of_each(experiments: Sequence[Experiment]) -> tables.Table:
    """A row per experiment: its winner, that one's score with its interval, the base's, and what a
    run of it cost.
    """
    rows = pd.DataFrame(
        [_row(name, one) for name, one in zip(names(experiments), experiments, strict=True)]
    )
    titles = {labels.metric(experiment.metric) for experiment in experiments}
    columns = [
        tables.Column("sweep", lambda row: row["name"], words=True),
        tables.Column("winner", lambda row: row["winner"] or "no winner", words=True),
        tables.Column(
            titles.pop() if len(titles) == 1 else "score",
            _scored("score"),
            sort=tables.number("score"),
        ),
        tables.Column(
            "expected when run again", _scored("expected"), sort=tables.number("expected")
        ),
        tables.Column("95% interval", lambda row: row["interval"], sort=tables.number("score")),
        tables.Column("base", _scored("base"), sort=tables.number("base")),
        tables.Column(
            "parameters", lambda row: _count(row["parameters"]), sort=tables.number("parameters")
        ),
        tables.Column(
            "time a run", lambda row: _time(row["seconds"]), sort=tables.number("seconds")
        ),
        tables.Column("trials", lambda row: str(row["trials"]), sort=tables.number("trials")),
    ]
    if any(experiment.inputs_changed for experiment in experiments):
        columns.append(tables.Column("inputs", lambda row: row["inputs"], words=True))
    leader = _leader(experiments)
    filled = [
        tables.Row(
            [column.cell(row) for column in columns],
            [column.key(row) for column in columns],
            place == leader,
            not row["winner"],
            str(row["status"]),
        )
        for place, row in enumerate(row for _, row in rows.iterrows())
    ]
    return tables.Table(columns, filled)


def pairs(experiments: Sequence[Experiment]) -> list[Pair]:
    """The leading experiment's winner against each other's, on the held-out problems that both kept
    samples of.
    """
    leader = _leader(experiments)
    if leader is None:
        return []
    called = names(experiments)
    others = [place for place in range(len(experiments)) if place != leader]
    return [
        _pair(called[leader], called[other], experiments[leader], experiments[other])
        for other in others
    ]


def answers(experiment: Experiment) -> pd.DataFrame:
    """The winning configuration's rewards per problem and seed, with each problem's text; empty
    without samples.
    """
    row, samples = winner_row(experiment), experiment.tables.samples
    if row is None or samples.empty:
        return pd.DataFrame(columns=["index", "seed", "reward", "question"])
    runs = experiment.tables.runs
    if experiment.is_sweep:
        chosen = (runs["configuration"] == row["configuration"]) & runs["score"].notna()
        runs = runs[chosen & ~runs["confirm"].astype(bool)]
    own = samples[samples["run_dir"].isin(runs["run_dir"]) & (samples["phase"] == "eval")]
    texts = own.dropna(subset="question").drop_duplicates("index").set_index("index")["question"]
    found = outcomes(own)
    return found.assign(question=found["index"].map(texts))


def _pair(name: str, against: str, first: Experiment, second: Experiment) -> Pair:
    if first.metric != second.metric:
        why = (
            f"{name} is judged by {labels.metric(first.metric)}, {against} by "
            f"{labels.metric(second.metric)}."
        )
        return Pair(name, against, "", "", 0, 0, "not comparable", why)
    if winner_row(second) is None:
        return Pair(name, against, "", "", 0, 0, "not comparable", f"{against} has no winner.")
    found = _paired(answers(first), answers(second))
    if found is None:
        why = (
            "They kept no samples of the same held-out problems "
            "(trainer.samples_per_dump): only their scores compare."
        )
        return Pair(name, against, "", "", 0, 0, "not comparable", why)
    low, high = found.effect.interval(ALPHA / 2)
    verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "cannot tell"
    says = {
        "better": f"{name} answers more of them right",
        "worse": f"{against} answers more of them right, though {name} has the better score",
        "cannot tell": "these problems do not tell the two apart",
        "not comparable": "",
    }[verdict]
    seeds = (
        f"{labels.plural(found.seeds, 'seed')} each"
        if found.seeds > 1
        else "one seed each, or seeds taken together"
    )
    text = (
        f"On {labels.plural(found.questions, 'problem')} that both answered ({seeds}) the "
        "rewards differ by "
        f"{found.effect.value:+.3f} on average ({low:+.3f} to {high:+.3f}): {says}. Chance "
        "in training is not in this "
        "interval."
    )
    return Pair(
        name,
        against,
        f"{found.effect.value:+.3f} reward",
        f"{low:+.3f} to {high:+.3f}",
        found.questions,
        found.seeds,
        verdict,
        text,
    )


def _paired(first: pd.DataFrame, second: pd.DataFrame) -> Paired | None:
    """The difference on the problems whose text is the same in both; over seeds together where none
    is shared.
    """
    if first.empty or second.empty:
        return None
    texts = first.drop_duplicates("index").merge(
        second.drop_duplicates("index"), on="index", suffixes=("", "_second")
    )
    same = set(texts.loc[texts["question"] == texts["question_second"], "index"])
    parts = [part[part["index"].isin(same)] for part in (first, second)]
    if not set(parts[0]["seed"]) & set(parts[1]["seed"]):
        parts = [
            part.groupby("index")["reward"].mean().reset_index().assign(seed=0) for part in parts
        ]
    return paired_difference(*parts)


def _leader(experiments: Sequence[Experiment]) -> int | None:
    """The place of the experiment with the best score, among those judged by the first winner's
    metric.
    """
    won = [
        (place, row)
        for place, one in enumerate(experiments)
        if (row := winner_row(one)) is not None
    ]
    if not won:
        return None
    metric = experiments[won[0][0]].metric
    scores = {
        place: _score(experiments[place]) for place, _ in won if experiments[place].metric == metric
    }
    best = max if experiments[won[0][0]].direction == "maximize" else min
    return best(scores, key=lambda place: scores[place])


def _score(experiment: Experiment) -> float:
    """The winning configuration's mean, or the run's score."""
    if experiment.best is not None and experiment.is_sweep:
        return experiment.best.score
    return float(experiment.complete[experiment.metric].iloc[0])


def _row(name: str, experiment: Experiment) -> dict[str, object]:
    row, held = winner_row(experiment), experiment.expected
    known = {
        "name": name,
        "metric": experiment.metric,
        "status": experiment.source["status"],
        "base": experiment.base,
        "trials": len(experiment.trials),
        "inputs": str(row["inputs"]) if experiment.inputs_changed and row is not None else "–",
        "expected": None if held is None else held.estimate.value,
    }
    if row is None:
        return {
            **known,
            "winner": "",
            "score": None,
            "interval": "–",
            "parameters": None,
            "seconds": None,
        }
    trial = experiment.best_trial()
    assert trial is not None
    values = labels.settings(reading.settings_of(experiment, trial))
    span = reading.winner_interval(experiment)
    return {
        **known,
        "winner": values,
        "score": _score(experiment),
        "interval": reading.range_words(experiment, *span) if span else "–",
        "parameters": row["parameters"],
        "seconds": row["seconds"],
    }


def _scored(name: str) -> Callable[[pd.Series], str]:
    return lambda row: labels.score(row["metric"], None if pd.isna(row[name]) else float(row[name]))


def _count(value: Any) -> str:
    return "–" if pd.isna(value) else f"{int(value):,}"


def _time(value: Any) -> str:
    return "–" if pd.isna(value) else metrics.duration(float(value))
