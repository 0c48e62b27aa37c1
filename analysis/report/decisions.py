"""The questions a user has, each with a value to use, how sure that is, what it costs, and what
would settle it.
"""

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
from analysis.stats.values import Comparison, Level, compare_values, is_full, matched
from harness.config import metrics

Verdict = Literal["best", "tied", "open", "not tested"]
UNTESTED: Verdict = "not tested"
MEANINGS: dict[Verdict, str] = {
    "best": "every other value tested is worse; of learning rates, the next on either "
    "side of the range",
    "tied": "no value tested is better by a tenth of what training gained; the cheapest "
    "of those is named",
    "open": "the runs do not settle it; what would is named",
    "not tested": "every run used the same value",
}
"""Meanings of the verdicts. Each question has its own error rate of 5%."""
SETTLED = "Settled for this model, task and length."
# More seeds than this are no advice, nor more values in a sentence.
MOST_SEEDS, MOST_VALUES = 12, 4
_MINI_BATCH = "trainer.policy_mini_batch_size"


@dataclass(frozen=True, slots=True)
class Decision:
    """One question answered as far as the runs go: `next` says what would settle it, `command` runs
    that.

    `at_edge`: the value is the last tested on its side, so that the best may lie beyond.
    """

    question: str
    value: str
    verdict: Verdict
    evidence: str
    cost: str
    next: str
    command: str | None
    at_edge: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """A setting: its column of `Tables.runs`, the recipe keys that set it, what belongs to it, and
    values to try.
    """

    text: str
    column: str
    keys: tuple[str, ...]
    with_it: tuple[str, ...] = ()

    def swept_keys(self, experiment: Experiment) -> list[str]:
        """Those of its keys that the sweep varied."""
        return [key for key in self.keys if key in experiment.axes]


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


def winner_row(experiment: Experiment) -> pd.Series | None:
    """The winning configuration's row of `Tables.runs`, or the run's own once complete; None when
    there is none.
    """
    trial = experiment.best_trial()
    runs = experiment.tables.runs
    return None if trial is None else runs[runs["run_dir"] == trial["run_dir"]].iloc[0]


def decisions(experiment: Experiment) -> list[Decision]:
    """A row per question; none without a winner. Full fine-tuning has neither alpha nor target
    modules to ask for.
    """
    row = winner_row(experiment)
    if row is None:
        return []
    asked = [one for one in QUESTIONS if one.column not in ("alpha", "targets") or not is_full(row)]
    return [
        _decide(experiment, question, row) for question in asked if pd.notna(row[question.column])
    ]


def _decide(experiment: Experiment, question: Question, row: pd.Series) -> Decision:
    name = _taken(question, row[question.column])
    if not experiment.is_sweep or not question.swept_keys(experiment):
        return _untested(experiment, question, row, name)
    runs = experiment.tables.runs
    # An adapter's alpha and targets are not full fine-tuning's, nor are its learning rates.
    alike = (
        runs
        if question.column in ("rank", "batch_size")
        else runs[(runs["full"] == row["full"]).fillna(False)]
    )
    others = [key for key in experiment.axes if key not in (*question.keys, *question.with_it)]
    if question.column == "lr":
        alike, others = _same_otherwise(alike, row, others)
    number = int(row["configuration"])
    found = compare_values(
        alike,
        question.column,
        number,
        others,
        experiment.base,
        maximize=experiment.direction == "maximize",
    )
    if found is None or len(found.levels) < 2:
        return _alone(experiment, question, row, name)
    if question.column == "lr":
        return _rate(experiment, question, row, found, _cost(question, found.chosen, found, alike))
    take = _cheapest(found, alike) if found.verdict == "tied" else found.chosen
    evidence, cost = _evidence(experiment, question, found), _cost(question, take, found, alike)
    if found.verdict == "open":
        settle, line = _settle(experiment, question, row, found)
    else:
        settle, line = SETTLED, None
    return Decision(
        question.text, _taken(question, take.value), found.verdict, evidence, cost, settle, line
    )


def _cheapest(found: Comparison, runs: pd.DataFrame) -> Level:
    """Of the values that are tied, the one with fewest trained parameters; the chosen one where
    that is no less.
    """
    return min(
        [found.chosen, *found.of("tied")], key=lambda level: _load(_done(found, level, runs))
    )


def _same_otherwise(
    runs: pd.DataFrame, row: pd.Series, others: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """The runs with the winner's other settings, or, where these have fewer than three rates, with
    its main ones.
    """
    main = [key for key in others if key in (RANK, TARGETS)]
    for keys in (list(others), main):
        same = runs[matched(runs, row, keys)]
        if same["lr"].nunique() > 2:
            return same, keys
    return runs[matched(runs, row, others)], list(others)


def _rate(
    experiment: Experiment, question: Question, row: pd.Series, found: Comparison, cost: str
) -> Decision:
    """Decide a learning rate as a range around the winner's, which ends before the next that is
    worse on each side.
    """
    tested, chosen = [float(level.value) for level in found.levels], float(found.chosen.value)
    place, worse = tested.index(chosen), [level.standing == "worse" for level in found.levels]
    first = next((at + 1 for at in reversed(range(place)) if worse[at]), 0)
    last = next((at - 1 for at in range(place, len(tested)) if worse[at]), len(tested) - 1)
    value = labels.lr(chosen)
    if first < last:
        value = (
            f"{labels.lr(tested[first])} to {labels.lr(tested[last])} (highest score at {value})"
        )
    evidence = _evidence(experiment, question, found)
    ahead = any(
        level.standing in ("better", "unstable") for level in found.levels[first : last + 1]
    )
    sure = found.chosen.score is not None and not found.chosen.collapsed and not ahead
    bounded = sure and first > 0 and last < len(tested) - 1
    verdict: Verdict = "best" if bounded else found.verdict
    edge = chosen in (tested[0], tested[-1])
    settle, line = SETTLED, None
    if edge:
        verdict = "open"
        beyond, end = _beyond(tested, chosen == tested[-1])
        seeds = experiment.seeds if len(experiment.seeds) > 1 else _seeds(experiment, 3)
        settle = f"Run rates beyond the {end} tested, where the best may lie."
        line = _grid(experiment, question, row, beyond, seeds)
    elif verdict == "open":
        settle, line = _settle(experiment, question, row, found)
    return Decision(question.text, value, verdict, evidence, cost, settle, line, at_edge=edge)


def _beyond(tested: list[float], high: bool) -> tuple[list[float], str]:
    """Rates from one end of the tested ones on, as far apart as those there, and which end
    that is.
    """
    step = min(max(tested[-1] / tested[-2] if high else tested[1] / tested[0], 2.0), 10.0)
    if high:
        return [float(f"{tested[-1] * step**power:.3g}") for power in (0, 1, 2)], "highest"
    return [float(f"{tested[0] / step**power:.3g}") for power in (2, 1, 0)], "lowest"


def _untested(experiment: Experiment, question: Question, row: pd.Series, name: str) -> Decision:
    """A setting that every run had alike: what to try."""
    evidence = "every run used it" if experiment.is_sweep else "a single run compares nothing"
    values = _to_try(experiment, question, row)
    seeds = experiment.seeds if experiment.is_sweep else _seeds(experiment, 3)
    line = _grid(experiment, question, row, values, seeds) if values else None
    # A mini-batch is set in prompts, and asked for in sequences.
    group = (
        lookup(experiment.recipe, "generator.n_samples_per_prompt")
        if question.column == "batch_size"
        else 1
    )
    tried = labels.listed(
        [_named(question, value * group if group != 1 else value) for value in values]
    )
    cost = _cost_of(experiment.tables.runs[experiment.tables.runs["run_dir"] == row["run_dir"]])
    settle = f"Run a sweep over {tried}." if values else "Run a sweep over it."
    return Decision(
        question.text, name, UNTESTED, labels.capital(evidence) + ".", cost, settle, line
    )


def _alone(experiment: Experiment, question: Question, row: pd.Series, name: str) -> Decision:
    """A setting of which only the winner's value has a configuration complete on every seed."""
    runs = experiment.tables.runs
    values = sorted(runs.loc[runs["configuration"].notna(), question.column].dropna().unique())
    line = _grid(experiment, question, row, values, experiment.seeds)
    evidence = (
        "No other value has a configuration that is complete on every seed and can be compared."
    )
    cost = _cost_of(runs[runs["run_dir"] == row["run_dir"]])
    settle = "Run them again beside the winner's other settings."
    return Decision(question.text, name, "open", evidence, cost, settle, line)


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
    experiment: Experiment, question: Question, row: pd.Series, found: Comparison
) -> tuple[str, str]:
    """Return what would settle an open question, and the command that runs it."""
    left = found.of("better", "unstable", "open")
    unfair, unstable = (
        [level for level in left if not level.fair],
        [level for level in left if level.collapsed],
    )
    count = len(experiment.seeds)
    if found.chosen.collapsed or unstable:
        count = min(2 * count, MOST_SEEDS)
        who = [found.chosen, *unstable] if found.chosen.collapsed else unstable
        why = (
            f"Run {labels.plural(count, 'seed')}: seeds of {_list(question, who)} "
            "collapsed, and few show how often."
        )
    elif any(level.score is None for level in (found.chosen, *left)):
        count = max(3, count)
        why = (
            f"Run {labels.plural(count, 'seed')} of each: with one, chance in training "
            "is not known."
        )
    elif unfair:
        why = f"Run {_list(question, unfair)} beside the winner's other settings."
    else:
        wanted = [found.seeds_needed(level, MOST_SEEDS) or MOST_SEEDS for level in left]
        count = max([*wanted, found.chosen.seeds + 1])
        why = f"Run about {labels.plural(count, 'seed')} of the values that are not told apart."
    values = [level.value for level in found.levels if level.standing == "chosen" or level in left]
    full = [value for value in values if question.column == "rank" and (value == 0) != is_full(row)]
    if full and len(full) == len(values) - 1:
        # Full fine-tuning's learning rates are about a tenth of LoRA's: one grid cannot hold both.
        rate = float(row["lr"]) * (10.0 if is_full(row) else 0.1)
        rates = [float(f"{rate * by:.2g}") for by in (1 / 3, 1.0, 3.0)]
        why = f"Run {_named(question, full[0])} at learning rates of its own."
        own = pd.concat([row.drop(RANK), pd.Series({RANK: full[0]})])
        return why, next_sweep.command(experiment, own, {LR: rates}, _seeds(experiment, count))
    return why, _grid(
        experiment,
        question,
        row,
        [one for one in values if one not in full],
        _seeds(experiment, count),
    )


def _grid(
    experiment: Experiment,
    question: Question,
    row: pd.Series,
    values: Sequence[Any],
    seeds: Sequence[int],
) -> str:
    """The command of a sweep over values of one setting, all others the winner's."""
    if any(key in experiment.axes for key in question.with_it):
        # Its values came each with others of their own, which no grid has.
        return next_sweep.again(experiment, seeds)
    key = next(iter(question.swept_keys(experiment)), question.keys[0])
    if question.column in ("targets", "batch_size") and key in row.index:
        # Where a column is not the key's own value: the key's values of the runs that have it.
        table = experiment.tables.runs.drop_duplicates(question.column).set_index(question.column)[
            key
        ]
        values = [table.get(value, value) for value in values]
    return next_sweep.command(experiment, row, {key: list(dict.fromkeys(values))}, seeds)


def _seeds(experiment: Experiment, count: int) -> list[int]:
    """So many seeds, those of the sweep first."""
    fresh = [seed for seed in range(count + len(experiment.seeds)) if seed not in experiment.seeds]
    return [*experiment.seeds, *fresh][: max(count, len(experiment.seeds))]


def _evidence(experiment: Experiment, question: Question, found: Comparison) -> str:
    """How far each other value is from the chosen one, nearest first."""
    first, rest = (
        found.chosen,
        sorted(found.others, key=lambda level: abs(level.mean - found.chosen.mean)),
    )
    name = _named(question, first.value)
    text = f"Against {name}, the winner's: "
    if first.collapsed:
        text = f"{name} is unstable: {first.collapsed} of its {first.tried} seeds collapsed. "
    elif first.score is None:
        text = (
            f"{name} reached {labels.score(experiment.metric, first.mean)} with one "
            "seed: chance is not known. "
        )
    parts = [_beside(experiment, question, found, level) for level in rest[:MOST_VALUES]]
    more, tail = rest[MOST_VALUES:], ""
    if more:
        left = sum(level.standing != "worse" for level in more)
        are = "is" if len(more) == 1 else "are"
        tail = (
            f"; {len(more)} more {are} worse"
            if not left
            else f"; of {len(more)} more {left} not told apart"
        )
    return f"{labels.capital(text)}{'; '.join(parts)}{tail}."


def _beside(experiment: Experiment, question: Question, found: Comparison, level: Level) -> str:
    name = _named(question, level.value)
    if level.standing == "unstable":
        return f"{name} is unstable, {level.collapsed} of {level.tried} seeds collapsed"
    if not level.fair:
        return f"{name} was tried only beside other settings"
    lead = found.chosen.mean - level.mean if level.ahead is None else level.ahead.value
    if level.ahead is None and experiment.direction == "minimize":
        lead = -lead
    gap = labels.score(experiment.metric, abs(lead))
    text = f"{name} is {gap} {'behind' if lead >= 0 else 'ahead'}"
    if level.interval is None:
        return text
    low, high = (labels.signed(experiment.metric, -end) for end in reversed(level.interval))
    margin = labels.score(experiment.metric, found.margin)
    verdict = {
        "worse": "worse",
        "better": "better",
        "tied": f"tied, less than {margin} apart",
        "open": "not told apart",
    }[level.standing]
    return f"{text} ({low} to {high}), {verdict}"


def _cost(question: Question, taken: Level, found: Comparison, runs: pd.DataFrame) -> str:
    """Return the median costs of the value's runs, and of the cheapest other value's where they
    differ.
    """
    text = f"{labels.capital(_named(question, taken.value))}: {_cost_of(_done(found, taken, runs))}"
    others = [level for level in found.levels if level is not taken]
    cheapest = min(others, key=lambda level: _load(_done(found, level, runs)))
    if question.column in ("rank", "targets", "batch_size"):
        text += f"; {_named(question, cheapest.value)}: {_cost_of(_done(found, cheapest, runs))}"
        return f"{text} (medians of each value's runs)."
    return f"{text} (medians of its runs); no value costs more than another."


def _done(found: Comparison, level: Level, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of a value that have a score."""
    return runs[runs["score"].notna() & (runs[found.column] == level.value)]


def _load(runs: pd.DataFrame) -> float:
    known = runs["parameters"].dropna()
    return float(known.median()) if len(known) else float("inf")


def _cost_of(runs: pd.DataFrame) -> str:
    """Parameters, time and tokens of some runs, by their medians."""
    parts = []
    for column, words in (
        ("parameters", "{} trained parameters"),
        ("seconds", "{} a run"),
        ("tokens", "{} tokens"),
    ):
        known = runs[column].dropna()
        if len(known):
            middle = float(known.median())
            parts.append(
                words.format(metrics.duration(middle) if column == "seconds" else f"{middle:,.0f}")
            )
    return ", ".join(parts) or "unknown"


def _list(question: Question, levels: list[Level]) -> str:
    return labels.listed([_named(question, level.value) for level in levels[:MOST_VALUES]])


def _taken(question: Question, value: Any) -> str:
    """A value as the answer to its question: `8`, where a sentence would say `rank 8`."""
    if question.column in ("rank", "alpha") and value:
        return labels.value(RANK if question.column == "rank" else ALPHA, value)
    return _named(question, value)


def _named(question: Question, value: Any) -> str:
    """A value in words: `rank 8`, `1e-3`, `mlp`, `128 sequences`."""
    if question.column == "batch_size":
        return f"{int(value)} sequences"
    if question.column in ("lr", "targets"):
        return labels.lr(float(value)) if question.column == "lr" else str(value)
    key = RANK if question.column == "rank" else ALPHA
    return labels.setting(key, value)
