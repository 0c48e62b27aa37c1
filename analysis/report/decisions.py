"""Answer a user's questions: a value to use, how sure that is, its cost, what would settle it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from analysis.data import labels
from analysis.data.labels import ALPHA, LR, RANK, TARGETS
from analysis.data.records import lookup
from analysis.experiment import Experiment
from analysis.report import next_sweep
from analysis.stats.values import ComparedValue, ValueComparison, is_full, matched
from harness.config import metrics

Sureness = Literal["best", "tied", "open", "not tested"]
UNTESTED: Sureness = "not tested"
MEANINGS: dict[Sureness, str] = {
    "best": "every other value tested is worse; for learning rates, the next on either side of the "
    "range",
    "tied": "no value tested is better by a tenth of what training gained; the cheapest is named",
    "open": "the runs do not settle it; the report says what would",
    "not tested": "every run used the same value",
}
"""The meaning of each verdict. Each question has its own error rate of 5%."""
SETTLED = "Settled for this model, task and length."
# The most seeds that are advised, and the most values in a sentence.
MOST_SEEDS, MOST_VALUES = 12, 4
_MINI_BATCH = "trainer.policy_mini_batch_size"


@dataclass(frozen=True, slots=True)
class Decision:
    """One question answered: `next` says what would settle it, and `command` runs that.

    `at_edge`: the value is the last tested on its side, so that a better one may lie beyond.
    """

    question: str
    value: str
    verdict: Sureness
    evidence: str
    cost: str
    next: str
    command: str | None
    at_edge: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A setting: its column of the table of runs, and the recipe keys that set it.

    `with_it` are keys that are swept together with it.
    """

    text: str
    column: str
    keys: tuple[str, ...]
    with_it: tuple[str, ...] = ()

    def swept_keys(self, experiment: Experiment) -> list[str]:
        """Return the keys that the sweep varied."""
        return [key for key in self.keys if key in experiment.axes]

    def name(self, value: Any) -> str:
        """Write a value in a sentence: `rank 8`, `1e-3`, `mlp`, `128 sequences`."""
        if self.column == "batch_size":
            return f"{int(value)} sequences"
        if self.column in ("lr", "targets"):
            return labels.lr(float(value)) if self.column == "lr" else str(value)
        return labels.setting(self.keys[0], value)

    def answer(self, value: Any) -> str:
        """Write a value as the answer: `8`, where a sentence says `rank 8`."""
        if self.column in ("rank", "alpha") and value:
            return labels.value(self.keys[0], value)
        return self.name(value)

    def names(self, values: list[ComparedValue]) -> str:
        """Write the first values of a list."""
        return labels.listed([self.name(value.value) for value in values[:MOST_VALUES]])


QUESTIONS = (
    Question("Which rank?", "rank", (RANK,)),
    Question("Which alpha?", "alpha", (ALPHA,)),
    Question("Which learning rate?", "lr", (LR,)),
    Question(
        "Which target modules?", "targets", (TARGETS, "trainer.policy.model.lora.target_modules")
    ),
    Question(
        "Which batch size?",
        "batch_size",
        (_MINI_BATCH, "generator.n_samples_per_prompt"),
        ("trainer.train_batch_size", "trainer.max_steps", "trainer.epochs"),
    ),
)


def decisions(experiment: Experiment) -> list[Decision]:
    """Return a decision for each question; none without a winner.

    Full fine-tuning has neither alpha nor target modules to decide on.
    """
    row = experiment.winner_row()
    if row is None:
        return []
    asked = [question for question in QUESTIONS if pd.notna(row[question.column])]
    if is_full(row):
        asked = [question for question in asked if question.column not in ("alpha", "targets")]
    return [_decide(experiment, question, row) for question in asked]


def _decide(experiment: Experiment, question: Question, row: pd.Series) -> Decision:
    if not experiment.is_sweep or not question.swept_keys(experiment):
        return _untested(experiment, question, row)
    runs = experiment.tables.runs
    if question.column not in ("rank", "batch_size"):
        # An adapter's alpha, targets and learning rates are not full fine-tuning's.
        runs = runs[(runs["full"] == row["full"]).fillna(False)]
    others = [key for key in experiment.axes if key not in (*question.keys, *question.with_it)]
    if question.column == "lr":
        runs, others = _same_otherwise(runs, row, others)
    compared = experiment.compare(question.column, int(row["configuration"]), others, runs)
    if compared is None or len(compared.values) < 2:
        return _no_other_value(experiment, question, row)
    if question.column == "lr":
        cost = _cost(question, compared.chosen, compared, runs)
        return _rate(experiment, question, row, compared, cost)
    value = compared.chosen
    if compared.verdict == "tied":
        # The value with the fewest trained parameters; the chosen one where none has fewer.
        candidates = [compared.chosen, *compared.of("tied")]
        value = min(candidates, key=lambda candidate: _parameters(compared, candidate, runs))
    settle, command = SETTLED, None
    if compared.verdict == "open":
        settle, command = _settle(experiment, question, row, compared)
    return Decision(
        question=question.text,
        value=question.answer(value.value),
        verdict=compared.verdict,
        evidence=_evidence(experiment, question, compared),
        cost=_cost(question, value, compared, runs),
        next=settle,
        command=command,
    )


def _same_otherwise(
    runs: pd.DataFrame, row: pd.Series, others: list[str]
) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs with the winner's other settings, and the keys of these.

    Where they have fewer than three rates, only rank and target modules need to agree.
    """
    for keys in (others, [key for key in others if key in (RANK, TARGETS)]):
        same = runs[matched(runs, row, keys)]
        if same["lr"].nunique() > 2:
            return same, keys
    return runs[matched(runs, row, others)], others


def _rate(
    experiment: Experiment, question: Question, row: pd.Series, compared: ValueComparison, cost: str
) -> Decision:
    """Decide a learning rate as a range around the winner's.

    It ends before the next rate that is worse on each side.
    """
    tested = [float(value.value) for value in compared.values]
    worse = [value.standing == "worse" for value in compared.values]
    chosen = float(compared.chosen.value)
    place = tested.index(chosen)
    first = next((at + 1 for at in reversed(range(place)) if worse[at]), 0)
    last = next((at - 1 for at in range(place, len(tested)) if worse[at]), len(tested) - 1)
    value = labels.lr(chosen)
    if first < last:
        ends = f"{labels.lr(tested[first])} to {labels.lr(tested[last])}"
        value = f"{ends} (highest score at {value})"
    inside = compared.values[first : last + 1]
    ahead = any(value.standing in ("better", "unstable") for value in inside)
    sure = compared.chosen.score is not None and not compared.chosen.collapsed and not ahead
    bounded = sure and first > 0 and last < len(tested) - 1
    verdict: Sureness = "best" if bounded else compared.verdict
    at_edge = chosen in (tested[0], tested[-1])
    settle, command = SETTLED, None
    if at_edge:
        verdict, high = "open", chosen == tested[-1]
        # Rates beyond the end, as far apart as those there.
        step = tested[-1] / tested[-2] if high else tested[1] / tested[0]
        step = min(max(step, 2.0), 10.0)
        powers = (0, 1, 2) if high else (-2, -1, 0)
        beyond = [float(f"{chosen * step**power:.3g}") for power in powers]
        seeds = (
            experiment.seeds if len(experiment.seeds) > 1 else next_sweep.more_seeds(experiment, 3)
        )
        end = "highest" if high else "lowest"
        settle = f"Run rates beyond the {end} tested: a better one may lie there."
        command = _grid(experiment, question, row, beyond, seeds)
    elif verdict == "open":
        settle, command = _settle(experiment, question, row, compared)
    evidence = _evidence(experiment, question, compared)
    return Decision(question.text, value, verdict, evidence, cost, settle, command, at_edge=at_edge)


def _untested(experiment: Experiment, question: Question, row: pd.Series) -> Decision:
    """Say what to try of a setting that every run had alike."""
    values = _to_try(experiment, question, row)
    seeds = experiment.seeds if experiment.is_sweep else next_sweep.more_seeds(experiment, 3)
    # A mini-batch is set in prompts, and asked for in sequences.
    group = lookup(experiment.recipe, "generator.n_samples_per_prompt")
    factor = group if question.column == "batch_size" and group else 1
    names = [question.name(value * factor if factor != 1 else value) for value in values]
    runs = experiment.tables.runs
    return Decision(
        question=question.text,
        value=question.answer(row[question.column]),
        verdict=UNTESTED,
        evidence="Every run used it." if experiment.is_sweep else "A single run compares nothing.",
        cost=_cost_of(runs[runs["run_dir"] == row["run_dir"]]),
        next=f"Run a sweep over {labels.listed(names) if names else 'it'}.",
        command=_grid(experiment, question, row, values, seeds) if values else None,
    )


def _no_other_value(experiment: Experiment, question: Question, row: pd.Series) -> Decision:
    """Say that only the winner's value has a configuration complete on every seed."""
    runs = experiment.tables.runs
    values = sorted(runs.loc[runs["configuration"].notna(), question.column].dropna().unique())
    return Decision(
        question=question.text,
        value=question.answer(row[question.column]),
        verdict="open",
        evidence="No other value has a configuration that is complete on every seed and can be "
        "compared.",
        cost=_cost_of(runs[runs["run_dir"] == row["run_dir"]]),
        next="Run them again beside the winner's other settings.",
        command=_grid(experiment, question, row, values, experiment.seeds),
    )


def _to_try(experiment: Experiment, question: Question, row: pd.Series) -> list[Any]:
    value = row[question.column]
    if question.column == "targets":
        return ["all-linear", "attention", "mlp"]
    if question.column == "rank":
        return [1, 8, 64] if int(value) in (0, 1, 8, 64) else [1, int(value), 4 * int(value)]
    if question.column == "batch_size":
        size = lookup(experiment.recipe, _MINI_BATCH)
        return [size // 4, size // 2, size] if isinstance(size, int) and size % 4 == 0 else []
    factor = 3.0 if question.column == "lr" else 2.0
    return [float(f"{float(value) * by:.2g}") for by in (1 / factor, 1.0, factor)]


def _settle(
    experiment: Experiment, question: Question, row: pd.Series, compared: ValueComparison
) -> tuple[str, str]:
    """Return what would settle an open question, and the command that runs it."""
    left = compared.of("better", "unstable", "open")
    unfair = [value for value in left if not value.fair]
    unstable = [value for value in left if value.collapsed]
    count = len(experiment.seeds)
    if compared.chosen.collapsed or unstable:
        count = min(2 * count, MOST_SEEDS)
        chosen = [compared.chosen] if compared.chosen.collapsed else []
        who = question.names([*chosen, *unstable])
        why = (
            f"Run {labels.plural(count, 'seed')}: seeds of {who} collapsed, and few seeds do not "
            "show how often."
        )
    elif any(value.score is None for value in (compared.chosen, *left)):
        count = max(3, count)
        seeds = labels.plural(count, "seed")
        why = f"Run {seeds} of each: with one, chance in training is not known."
    elif unfair:
        why = f"Run {question.names(unfair)} beside the winner's other settings."
    else:
        needed = [compared.seeds_needed(value, MOST_SEEDS) or MOST_SEEDS for value in left]
        count = max([*needed, compared.chosen.seeds + 1])
        why = f"Run about {labels.plural(count, 'seed')} of the values that are not told apart."
    values = [
        value.value for value in compared.values if value.standing == "chosen" or value in left
    ]
    full = [value for value in values if question.column == "rank" and (value == 0) != is_full(row)]
    if full and len(full) == len(values) - 1:
        # Full fine-tuning's learning rates are about a tenth of LoRA's: one grid cannot hold both.
        rate = float(row["lr"]) * (10.0 if is_full(row) else 0.1)
        rates = [float(f"{rate * by:.2g}") for by in (1 / 3, 1.0, 3.0)]
        why = f"Run {question.name(full[0])} at learning rates of its own."
        other = pd.concat([row.drop(RANK), pd.Series({RANK: full[0]})])
        seeds_of = next_sweep.more_seeds(experiment, count)
        return why, next_sweep.grid_sweep(experiment, other, {LR: rates}, seeds_of)
    kept = [value for value in values if value not in full]
    return why, _grid(experiment, question, row, kept, next_sweep.more_seeds(experiment, count))


def _grid(
    experiment: Experiment,
    question: Question,
    row: pd.Series,
    values: Sequence[Any],
    seeds: Sequence[int],
) -> str:
    """Return the command of a sweep over values of one setting, all others the winner's."""
    if any(key in experiment.axes for key in question.with_it):
        # Each value came with other keys of its own, which a grid cannot express.
        return next_sweep.again(experiment, seeds)
    key = next(iter(question.swept_keys(experiment)), question.keys[0])
    if question.column in ("targets", "batch_size") and key in row.index:
        # The column is not the key's own value: take the key's values of the runs that have it.
        runs = experiment.tables.runs.drop_duplicates(question.column)
        table = runs.set_index(question.column)[key]
        values = [table.get(value, value) for value in values]
    return next_sweep.grid_sweep(experiment, row, {key: list(dict.fromkeys(values))}, seeds)


def _evidence(experiment: Experiment, question: Question, compared: ValueComparison) -> str:
    """Say how far each other value is from the chosen one, nearest first."""
    first = compared.chosen
    rest = sorted(compared.others, key=lambda value: abs(value.mean - first.mean))
    name = question.name(first.value)
    text = f"Against {name}, the winner's: "
    if first.collapsed:
        text = f"{name} is unstable: {first.collapsed} of its {first.tried} seeds collapsed. "
    elif first.score is None:
        mean = labels.score(experiment.metric, first.mean)
        text = f"{name} reached {mean} with one seed, so chance is not known. "
    parts = [_beside(experiment, question, compared, value) for value in rest[:MOST_VALUES]]
    if more := rest[MOST_VALUES:]:
        left = sum(value.standing != "worse" for value in more)
        worse = f"{len(more)} more {'is' if len(more) == 1 else 'are'} worse"
        parts.append(f"of {len(more)} more {left} not told apart" if left else worse)
    return f"{labels.capital(text)}{'; '.join(parts)}."


def _beside(
    experiment: Experiment, question: Question, compared: ValueComparison, value: ComparedValue
) -> str:
    name, metric = question.name(value.value), experiment.metric
    if value.standing == "unstable":
        return f"{name} is unstable, {value.collapsed} of {value.tried} seeds collapsed"
    if not value.fair:
        return f"{name} was tried only beside other settings"
    if value.ahead is not None:
        lead = value.ahead.value
    else:
        lead = compared.chosen.mean - value.mean
        lead = -lead if experiment.direction == "minimize" else lead
    behind = "behind" if lead >= 0 else "ahead"
    text = f"{name} is {labels.score(metric, abs(lead))} {behind}"
    if value.interval is None:
        return text
    low, high = (labels.signed(metric, -end) for end in reversed(value.interval))
    verdict = {
        "tied": f"tied, less than {labels.score(metric, compared.margin)} apart",
        "open": "not told apart",
    }.get(value.standing, value.standing)
    return f"{text} ({low} to {high}), {verdict}"


def _cost(
    question: Question, value: ComparedValue, compared: ValueComparison, runs: pd.DataFrame
) -> str:
    """Return the median costs of a value's runs, and of the cheapest other value's."""
    cost = _cost_of(_scored(compared, value, runs))
    text = f"{labels.capital(question.name(value.value))}: {cost}"
    if question.column not in ("rank", "targets", "batch_size"):
        return f"{text} (medians of its runs); no value costs more than another."
    others = [other for other in compared.values if other is not value]
    cheapest = min(others, key=lambda other: _parameters(compared, other, runs))
    other = f"{question.name(cheapest.value)}: {_cost_of(_scored(compared, cheapest, runs))}"
    return f"{text}; {other} (medians of each value's runs)."


def _scored(compared: ValueComparison, value: ComparedValue, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of a value that have a score."""
    return runs[runs["score"].notna() & (runs[compared.column] == value.value)]


def _parameters(compared: ValueComparison, value: ComparedValue, runs: pd.DataFrame) -> float:
    known = _scored(compared, value, runs)["parameters"].dropna()
    return float(known.median()) if len(known) else float("inf")


def _cost_of(runs: pd.DataFrame) -> str:
    """Write the median parameters, time and tokens of some runs."""
    parts = []
    for column, words in (
        ("parameters", "{:,.0f} trained parameters"),
        ("seconds", "{} a run"),
        ("tokens", "{:,.0f} tokens"),
    ):
        known = runs[column].dropna()
        if len(known):
            median = float(known.median())
            parts.append(words.format(metrics.duration(median) if column == "seconds" else median))
    return ", ".join(parts) or "unknown"
