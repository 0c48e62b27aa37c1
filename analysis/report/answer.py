"""Say in plain sentences what a run or sweep found and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.data import labels
from analysis.data.labels import ALPHA, LR, MAIN_KEYS, RANK, TARGETS
from analysis.data.records import OTHER_INPUTS, lookup
from analysis.experiment import Experiment
from analysis.stats import ranking
from analysis.stats.effects import Estimate
from analysis.stats.rates import rate_span
from analysis.stats.scores import could_collapse, seeds_to_bound
from analysis.stats.selection import shrunken
from harness.config import metrics
from harness.records.run_dir import Status

# The page asks for as many seeds as bound the share of collapsing seeds at this.
COLLAPSE_BOUND = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """The headline: what won, its score against the base's, and how sure that is.

    `settings` has a name, a value and whether it was swept; `scores` a name, a value and a note.
    """

    title: str
    settings: list[tuple[str, str, bool]]
    scores: list[tuple[str, str, str]]
    sentences: list[str]

    def text(self) -> str:
        """Return the whole answer as one paragraph."""
        return " ".join([self.title, *self.sentences])


def answer(experiment: Experiment) -> Answer:
    """Return the headline of a sweep or of a single run."""
    trial = experiment.best_trial()
    if trial is None:
        return _no_answer(experiment)
    values = settings_of(experiment, trial)
    shown = [
        (labels.key(key), labels.value(key, value), key in experiment.axes)
        for key, value in values.items()
        if labels.matters(key, values)
    ]
    best = experiment.best
    if experiment.is_sweep and best is not None:
        score, seeds = best.score, best.seeds
        interval = ranking.spread([score], experiment.problems) if seeds == 1 else None
        title = _sweep_title(experiment, best, values, _reached(experiment, score, interval))
        sentences = _sweep_sentences(experiment, best, values)
    else:
        score, seeds = float(trial[experiment.metric]), 1
        interval = ranking.spread([score], experiment.problems)
        reached = _reached(experiment, score, interval)
        title = f"{labels.capital(labels.settings(values))} reached {reached}"
        sentences = [_clear_of_base(experiment, score)]
    scores = _scores(experiment, score, interval, seeds)
    return Answer(title, shown, scores, [sentence for sentence in sentences if sentence])


def settings_of(experiment: Experiment, trial: pd.Series) -> dict[str, Any]:
    """Return a trial's rank, alpha, learning rate and target modules, then its other swept keys."""
    recipe = experiment.recipe
    values: dict[str, Any] = {}
    # A sweep over adapters to start from leaves rank, alpha and modules to the adapter.
    starts = isinstance(trial.get("trainer.policy.model.lora.adapter_path"), str)
    for key in (*MAIN_KEYS, *experiment.axes):
        if key in trial.index or not starts or key not in (RANK, ALPHA, TARGETS):
            values[key] = trial[key] if key in trial.index else lookup(recipe, key)
    adapter = lookup(recipe, "trainer.policy.model.lora.target_modules")
    if adapter is not None and not starts and TARGETS not in trial.index:
        values[TARGETS] = adapter
    return {key: value for key, value in values.items() if value is not None}


def winner_interval(experiment: Experiment) -> tuple[float, float] | None:
    """Return the 95% interval of the best score: over its seeds, else over the problems."""
    if experiment.expected is not None:
        return _ends(experiment, experiment.expected.estimate)
    trial = experiment.best_trial()
    if trial is None or len(experiment.seeds) > 1:
        return None
    interval = ranking.spread([float(trial[experiment.metric])], experiment.problems)
    return None if interval is None else (interval.low, interval.high)


def _ends(experiment: Experiment, estimate: Estimate) -> tuple[float, float]:
    """Return the 95% interval of a score by Student's t; that of a share stays within 0 and 1."""
    low, high = estimate.interval(0.025)
    share = metrics.lookup(experiment.metric).unit == "share"
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


def rate_rows(experiment: Experiment) -> list[dict[str, str]]:
    """Return the learning-rate table: for each rank what was too low, good, best and too high."""
    if LR not in experiment.axes:
        return []
    ranks: list[list[int]] = [[]]
    if RANK in experiment.trials.columns:
        ranks = [[int(rank)] for rank in sorted(experiment.trials[RANK].dropna().unique())]
    rows = []
    for rank in ranks:
        split = experiment.rate_split(*rank)
        if split is None:
            continue
        best = labels.lr(split.best) if split.best is not None else "none rose above the base"
        cells = {"too_low": split.too_low, "good": split.good, "too_high": split.too_high}
        words = {name: rate_span(lrs) if lrs else "none seen" for name, lrs in cells.items()}
        rows.append({"rank": labels.rank(*rank) if rank else "all trials", "best": best, **words})
    return rows


def standing(experiment: Experiment) -> str:
    """Say how many trials ended how, and whether the sweep has ended."""
    changed = _changed_inputs(experiment)
    if not experiment.is_sweep:
        return f"A single run: {str(experiment.source['status']).lower()}.{changed}"
    counts = experiment.trials["status"].value_counts()
    order = [Status.COMPLETE, Status.RUNNING, Status.CREATED, Status.PRUNED, Status.FAILED]
    known = [status.value for status in order if status.value in counts.index]
    names = known + [status for status in counts.index if status not in known]
    parts = [f"{int(counts[name])} {str(name).lower()}" for name in names]
    text = "No trial yet"
    if parts:
        text = f"{labels.plural(len(experiment.trials), 'trial')}: {labels.listed(parts)}"
    if pd.notna(experiment.source["seconds"]):
        text += f", in {metrics.duration(float(experiment.source['seconds']))}"
    if not experiment.finished:
        text += ". The sweep has not ended: this page shows what there is so far"
    return f"{text}.{changed}"


def _changed_inputs(experiment: Experiment) -> str:
    """Say which trials were trained on which inputs, where these changed."""
    if not experiment.inputs_changed:
        return ""
    entries = [
        entry
        for entry in experiment.manifest.get("resumed") or []
        if isinstance(entry, dict) and isinstance(entry.get("inputs"), dict)
    ]
    changes = [str(change) for entry in entries for change in entry.get("different") or []]
    what = f" ({'; '.join(changes)})" if changes else ""
    if not experiment.is_sweep:
        steps = labels.listed([str(entry["inputs"].get("step")) for entry in entries])
        return f" Its inputs changed after step {steps}{what}: its curve mixes two experiments."
    runs = experiment.tables.runs
    apart = int((runs["status"] == OTHER_INPUTS).sum())
    compared = labels.listed(sorted(runs.loc[runs["score"].notna(), "inputs"].unique()))
    kept = f"Only trials on inputs {compared} are compared"
    if not compared:
        kept = "No trial is complete yet"
    others = f"{labels.plural(apart, 'trial')} on other inputs {'is' if apart == 1 else 'are'}"
    return f" Its inputs changed while it ran{what}. {kept}; {others} marked."


def _no_answer(experiment: Experiment) -> Answer:
    metric, sentences = experiment.metric, list[str]()
    if not experiment.is_sweep:
        row = experiment.trials.iloc[0]
        last = labels.score(metric, row[f"last/{metric}"])
        why = f" ({row['reason']})" if isinstance(row["reason"], str) else ""
        title = f"This run is {row['status']}{why}: it has no final score."
        return Answer(title, [], [], [f"Its last evaluation was {last}."] if last != "–" else [])
    yet, count = "" if experiment.finished else " yet", len(experiment.seeds)
    if count == 1:
        return Answer(f"No winner{yet}: no trial has completed.", [], [], [])
    title = f"No winner{yet}: no configuration has all its {count} seeds complete."
    leading = experiment.configurations[experiment.configurations["n"] > 0]
    if leading.empty:
        sentences.append("No trial has completed.")
    else:
        first = leading.iloc[0]
        values = _settings(experiment, first) or "the only configuration"
        score = labels.score(metric, first["mean"])
        sentences.append(
            f"The best so far is {values}, with {score} on {first['n']} of {count} seeds."
        )
    return Answer(title, [], [], sentences)


def _settings(experiment: Experiment, row: pd.Series) -> str:
    """Write the swept settings of a configuration."""
    return labels.settings({key: row[key] for key in experiment.axes})


def _reached(experiment: Experiment, score: float, interval: ranking.Interval | None) -> str:
    text = f"{labels.metric(experiment.metric)} {labels.score(experiment.metric, score)}"
    text += f" ({_interval_words(experiment, interval)})" if interval else ""
    if experiment.base is not None:
        text += f", against the base's {labels.score(experiment.metric, experiment.base)}"
    return f"{text}."


def _interval_words(experiment: Experiment, interval: ranking.Interval) -> str:
    """Write an interval: `95% interval over 512 problems: 0.266 to 0.349`."""
    span = labels.score_range(experiment.metric, interval.low, interval.high)
    return f"{interval.source}: {span}"


def _scores(
    experiment: Experiment, score: float, interval: ranking.Interval | None, seeds: int
) -> list[tuple[str, str, str]]:
    """Return the headline's numbers: score, base model, change, and the expected score."""
    metric, base, held = experiment.metric, experiment.base, experiment.expected
    fresh = experiment.best is not None and experiment.best.confirmed
    note = _interval_words(experiment, interval) if interval else "no interval: one seed"
    if seeds > 1:
        note = f"mean of {seeds} {'fresh seeds' if fresh else 'seeds'}"
    scores = [(labels.metric(metric), labels.score(metric, score), note)]
    if base is not None:
        of_base = experiment.base_interval
        note = _interval_words(experiment, of_base) if of_base else ""
        gain = labels.score(metric, score - base)
        scores.append(("base model", labels.score(metric, base), note))
        scores.append(("change", gain if gain.startswith("-") else f"+{gain}", "trained − base"))
    if held is not None:
        span = labels.score_range(metric, *_ends(experiment, held.estimate))
        value = labels.score(metric, held.estimate.value)
        scores.append(("expected when run again", value, f"95% interval {span}"))
    return scores


def _sweep_title(
    experiment: Experiment, best: ranking.Winner, values: dict[str, Any], reached: str
) -> str:
    if best.candidates == 1:
        return f"Only one configuration is complete: {labels.settings(values)}, with {reached}"
    won = "won"
    if best.ties:
        won = f"shares first place with {labels.plural(len(best.ties), 'other')}"
    if best.confirmed:
        won = f"{won if best.ties else 'scored best'} on {best.seeds} fresh seeds"
    return f"Of {best.candidates} configurations, {labels.settings(values)} {won}: {reached}"


def _sweep_sentences(
    experiment: Experiment, best: ranking.Winner, values: dict[str, Any]
) -> list[str]:
    ranked = experiment.configurations[experiment.configurations["whole"]]
    return [
        _overturned(experiment, best, ranked),
        _expected(experiment, ranked),
        _seeds(experiment, best, ranked.iloc[0]),
        _clear_of_base(experiment, best.score),
        _runner_up(experiment, ranked),
        _at_edge(experiment, values),
        _unranked(experiment),
    ]


def _overturned(experiment: Experiment, best: ranking.Winner, ranked: pd.DataFrame) -> str:
    """Say that the fresh seeds rank otherwise than the sweep did."""
    if not best.confirmed or best.leader == best.configuration:
        return ""
    leader = ranked[ranked["configuration"] == best.leader].iloc[0]
    who, metric = _settings(experiment, leader), experiment.metric
    led, fresh = (labels.score(metric, leader[name]) for name in ("mean", "fresh"))
    if pd.isna(leader["fresh"]):
        return (
            f"{labels.capital(who)} led the sweep with {led} and was not run on the fresh seeds: "
            "confirm more configurations."
        )
    return (
        f"The fresh seeds overturn the sweep: {who} led it with {led} and scored {fresh} on them."
    )


def _expected(experiment: Experiment, ranked: pd.DataFrame) -> str:
    """Say which score to expect when the winner is run again, corrected for selection bias."""
    metric, held, problems = experiment.metric, experiment.expected, experiment.problems
    if held is not None:
        value = labels.score(metric, held.estimate.value)
        span = labels.score_range(metric, *_ends(experiment, held.estimate))
        return (
            f"Run again, expect {value} (95% interval {span}), corrected for selection bias "
            f"(winner's curse). It rests on {held.how}."
        )
    if len(ranked) < 4 or not problems or ranked["n"].max() > 1:
        return ""
    means = [float(mean) for mean in ranked["mean"]]
    mean = float(ranked["mean"].mean())
    value = labels.score(metric, shrunken(means, mean * (1 - mean) / problems)[0])
    return (
        f"Run again, expect about {value}, corrected for selection bias (winner's curse). "
        "One seed: no interval."
    )


def _clear_of_base(experiment: Experiment, score: float) -> str:
    if experiment.base is None:
        return "The base was not evaluated before training, so the gain is unknown."
    if not experiment.better(score, experiment.base):
        return "That is no better than the base: training did not help."
    interval, of_base = winner_interval(experiment), experiment.base_interval
    if interval is None or of_base is None:
        return ""
    if interval[0] <= of_base.high and of_base.low <= interval[1]:
        return "Its interval and the base's overlap: the gain may be chance."
    return "Its interval and the base's do not overlap: the gain is more than chance."


def _seeds(experiment: Experiment, best: ranking.Winner, first: pd.Series) -> str:
    """Say how far the winner's seeds differ, whether one collapsed, and how many still could."""
    if experiment.comparison is None:
        return ""
    collapsed, count = experiment.comparison.chosen.collapsed, experiment.comparison.chosen.tried
    if collapsed:
        return (
            f"It is unstable: {collapsed} of its {count} seeds collapsed, and lost more than half "
            "of the gain."
        )
    bound = f"{could_collapse(count):.0%}"
    if count == 1:
        return (
            f"It has one seed: how far seeds differ is not known, and up to {bound} of them could "
            "collapse."
        )
    kind, prefix = ("fresh seeds", "fresh_") if best.confirmed else ("seeds", "")
    low, high = first[f"{prefix}min"], first[f"{prefix}max"]
    including = ", those of the sweep included," if best.confirmed else ""
    needed = seeds_to_bound(COLLAPSE_BOUND)
    more = f"; {needed} such seeds bound that at {COLLAPSE_BOUND:.0%}" if count < needed else ""
    return (
        f"Its {best.seeds} {kind} gave {labels.score_range(experiment.metric, low, high)}. None of "
        f"its {count} seeds{including} collapsed: with 95% confidence at most {bound} would{more}."
    )


def _runner_up(experiment: Experiment, ranked: pd.DataFrame) -> str:
    comparison = experiment.comparison
    if len(ranked) < 2 or comparison is None:
        return ""
    first, second = ranked.iloc[0], ranked.iloc[1]
    gap = labels.score(experiment.metric, abs(first["score"] - second["score"]))
    behind = f"is {gap} behind" if first["score"] != second["score"] else "ties with it"
    if pd.isna(second["fresh"]) and pd.notna(first["fresh"]):
        behind = "was not run on the fresh seeds"
    text = f"The runner-up ({_settings(experiment, second)}) {behind}."
    if comparison.chosen.score is None:
        unknown = "chance in training is not known"
        return f"{text} One seed does not tell configurations apart: {unknown}."
    near = len(comparison.others) - len(comparison.of("worse"))
    if not near:
        return f"{text} Every other configuration is told apart from the winner."
    others, are = (
        labels.plural(len(ranked) - 1, "other configuration"),
        "is" if near == 1 else "are",
    )
    return f"{text} {near} of {others} {are} not told apart from the winner."


def _at_edge(experiment: Experiment, values: dict[str, Any]) -> str:
    """Say that the winner's learning rate is the last tested on its side."""
    if LR not in experiment.axes:
        return ""
    by_rank = RANK in experiment.trials.columns
    split = experiment.rate_split(*([int(values[RANK])] if by_rank else []))
    if split is None or split.best is None or len(split.tested) < 2:
        return ""
    where = " at this rank" if by_rank else ""
    for end, word in ((0, "lowest"), (-1, "highest")):
        if float(values[LR]) == split.tested[end]:
            return f"Its learning rate is the {word} tested{where}: a better one may lie beyond."
    return ""


def _unranked(experiment: Experiment) -> str:
    waiting = experiment.configurations[~experiment.configurations["whole"]]
    if waiting.empty:
        return ""
    what = "did not complete" if len(experiment.seeds) == 1 else "did not complete on every seed"
    what += " of the same inputs" if experiment.inputs_changed else ""
    count = labels.plural(len(waiting), "more configuration")
    return f"{count} {what} and cannot win; the table of configurations shows why."
