"""What the numbers say, in plain sentences computed from the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.data import labels
from analysis.data.labels import LR, MAIN_KEYS, RANK, TARGETS
from analysis.data.records import OTHER_INPUTS, lookup
from analysis.experiment import Experiment
from analysis.stats import ranking as stats
from analysis.stats import selection as stats_seeds
from analysis.stats.effects import Estimate
from analysis.stats.values import COLLAPSE_BOUND, could_collapse, seeds_to_bound
from harness.config import metrics
from harness.records.run_dir import Status


@dataclass(frozen=True, slots=True)
class Answer:
    """The headline: what won, at what score against the base's, and how sure that is."""

    title: str
    settings: list[tuple[str, str, bool]]
    scores: list[tuple[str, str, str]]
    sentences: list[str]

    def text(self) -> str:
        """The whole answer as one paragraph."""
        return " ".join([self.title, *self.sentences])


def answer(experiment: Experiment) -> Answer:
    """The headline of a sweep or of a single run."""
    trial = experiment.best_trial()
    if trial is None:
        return _no_answer(experiment)
    values = settings_of(experiment, trial)
    kept = {key: value for key, value in values.items() if labels.matters(key, values)}
    shown = [
        (labels.key(key), labels.value(key, value), key in experiment.axes)
        for key, value in kept.items()
    ]
    if experiment.is_sweep:
        return _sweep_answer(experiment, values, shown)
    score = float(trial[experiment.metric])
    found = stats.spread([score], experiment.problems)
    title = (
        f"{labels.capital(labels.settings(values))} reached "
        f"{_scored(experiment, score, found)}{_against(experiment)}."
    )
    return Answer(
        title, shown, _tiles(experiment, score, found, 1), [_clear_of_base(experiment, score)]
    )


def settings_of(experiment: Experiment, trial: pd.Series) -> dict[str, Any]:
    """Rank, alpha, learning rate and target modules of a trial, swept or not, then its other swept
    keys.
    """
    recipe = experiment.recipe
    values: dict[str, Any] = {}
    for key in (*MAIN_KEYS, *experiment.axes):
        values[key] = trial[key] if key in trial.index else lookup(recipe, key)
    own = lookup(recipe, "trainer.policy.model.lora.target_modules")
    if own is not None and TARGETS not in trial.index:
        values[TARGETS] = own
    return {key: value for key, value in values.items() if value is not None}


def winner_interval(experiment: Experiment) -> tuple[float, float] | None:
    """The 95% interval of the winner's score: over its seeds, else over the problems; None where
    there is no basis.
    """
    if experiment.expected is not None:
        return ends(experiment, experiment.expected.estimate)
    trial = experiment.best_trial()
    found = (
        None
        if trial is None
        else stats.spread([float(trial[experiment.metric])], experiment.problems)
    )
    return None if found is None or len(experiment.seeds) > 1 else (found.low, found.high)


def ends(experiment: Experiment, estimate: Estimate) -> tuple[float, float]:
    """The 95% interval of a score by Student's t; that of a share stays within 0 and 1."""
    low, high = estimate.interval(0.025)
    return (
        (max(low, 0.0), min(high, 1.0))
        if metrics.lookup(experiment.metric).unit == "share"
        else (low, high)
    )


def rate_words(basin: stats.Basin) -> str:
    """Which learning rates are too low, good and too high, in one line."""
    if not basin.good or basin.best is None:
        return "no learning rate tested rose above the base."
    span = _span(basin.good)
    low = f"{_span(basin.too_low)} too low" if basin.too_low else "nothing tested was too low"
    high = f"{_span(basin.too_high)} too high" if basin.too_high else "nothing tested was too high"
    good = f"{span} good" + (f" (best {labels.lr(basin.best)})" if len(basin.good) > 1 else "")
    return f"{low}, {good}, {high}."


def rate_rows(experiment: Experiment) -> list[dict[str, str]]:
    """The learning-rate table: a row per rank, with what was too low, good, best and too high
    there.
    """
    if LR not in experiment.axes:
        return []
    ranks: list[int | None] = [None]
    if RANK in experiment.trials.columns:
        ranks = [int(rank) for rank in sorted(experiment.trials[RANK].dropna().unique())]
    rows = []
    for rank in ranks:
        basin = experiment.basin() if rank is None else experiment.basin(rank)
        if basin is None:
            continue
        name = "all trials" if rank is None else labels.setting(RANK, rank)
        best = labels.lr(basin.best) if basin.best is not None else "none rose above the base"
        cells = {"too_low": basin.too_low, "good": basin.good, "too_high": basin.too_high}
        rows.append(
            {
                "rank": name,
                "best": best,
                **{k: _span(v) if v else "none seen" for k, v in cells.items()},
            }
        )
    return rows


def standing(experiment: Experiment) -> str:
    """How many trials ended how, and whether the sweep has ended."""
    counts = experiment.trials["status"].value_counts()
    changed = _changed_inputs(experiment)
    if not experiment.is_sweep:
        return f"A single run: {str(experiment.source['status']).lower()}.{changed}"
    parts = [
        f"{int(counts[status])} {str(status).lower()}"
        for status in sorted(counts.index, key=_status_order)
    ]
    text = (
        f"{labels.plural(len(experiment.trials), 'trial')}: {labels.listed(parts)}"
        if parts
        else "No trial yet"
    )
    if pd.notna(experiment.source["seconds"]):
        text += f", in {metrics.duration(float(experiment.source['seconds']))}"
    text += (
        "."
        if experiment.finished
        else ". The sweep has not ended: this page shows what there is so far."
    )
    return f"{text}{changed}"


def _changed_inputs(experiment: Experiment) -> str:
    """Which trials were trained on which inputs, as one more sentence; empty where the inputs did
    not change.
    """
    if not experiment.inputs_changed:
        return ""
    entries = [
        entry for entry in experiment.manifest.get("resumed") or [] if isinstance(entry, dict)
    ]
    found = [entry for entry in entries if isinstance(entry.get("inputs"), dict)]
    what = "; ".join(str(change) for entry in found for change in entry.get("different") or [])
    what = f" ({what})" if what else ""
    if not experiment.is_sweep:
        steps = [str(entry["inputs"].get("step")) for entry in found]
        return (
            f" Its inputs changed after step {labels.listed(steps)}{what}: its curve is "
            "that of two experiments."
        )
    runs = experiment.tables.runs
    apart = int((runs["status"] == OTHER_INPUTS).sum())
    compared = labels.listed(sorted(runs.loc[runs["score"].notna(), "inputs"].unique()))
    kept = (
        f"only trials on inputs {compared} are compared" if compared else "no trial is complete yet"
    )
    return (
        f" Its inputs changed while it ran{what}: {kept}, and "
        f"{labels.plural(apart, 'trial')} on others marked."
    )


def _sweep_answer(
    experiment: Experiment, values: dict[str, Any], shown: list[tuple[str, str, bool]]
) -> Answer:
    best, ranked = experiment.best, experiment.configurations[experiment.configurations["whole"]]
    assert best is not None
    first = ranked.iloc[0]
    one = stats.spread([best.score], experiment.problems) if best.seeds == 1 else None
    reached = f"{_scored(experiment, best.score, one)}{_against(experiment)}."
    won = (
        f"shares first place with {labels.plural(len(best.ties), 'other')}" if best.ties else "won"
    )
    if best.confirmed:
        won = f"{'scored best' if not best.ties else won} on {best.seeds} fresh seeds"
    title = f"Of {len(ranked)} configurations, {labels.settings(values)} {won}: {reached}"
    if len(ranked) == 1:
        title = f"Only one configuration is complete: {labels.settings(values)}, with {reached}"
    sentences = [
        *_overturned(experiment, ranked),
        _again(experiment, ranked),
        _seeds(experiment, first),
        _clear_of_base(experiment, best.score),
        *_runner_up(experiment, ranked),
        *_edge(experiment, values),
        *_unranked(experiment),
    ]
    return Answer(
        title, shown, _tiles(experiment, best.score, one, best.seeds), [s for s in sentences if s]
    )


def _overturned(experiment: Experiment, ranked: pd.DataFrame) -> list[str]:
    """That the sweep ranked otherwise than the fresh seeds do."""
    best = experiment.best
    assert best is not None
    if not best.confirmed or best.leader == best.configuration:
        return []
    leader = ranked[ranked["configuration"] == best.leader].iloc[0]
    who = labels.settings({key: leader[key] for key in experiment.axes})
    led = labels.score(experiment.metric, leader["mean"])
    if pd.isna(leader["fresh"]):
        return [
            (
                f"{labels.capital(who)} led the sweep with {led} and was not run on the fresh "
                "seeds: confirm more."
            )
        ]
    fresh = labels.score(experiment.metric, leader["fresh"])
    return [
        f"The fresh seeds overturn the sweep: {who} led it with {led} and scored {fresh} on them."
    ]


def _no_answer(experiment: Experiment) -> Answer:
    if not experiment.is_sweep:
        row = experiment.trials.iloc[0]
        last = labels.score(experiment.metric, row[f"last/{experiment.metric}"])
        why = f" ({row['reason']})" if isinstance(row["reason"], str) else ""
        title = f"This run is {row['status']}{why}: it has no final score."
        return Answer(title, [], [], [f"Its last evaluation was {last}."] if last != "–" else [])
    yet = "" if experiment.finished else " yet"
    if len(experiment.seeds) == 1:
        return Answer(f"No winner{yet}: no trial has completed.", [], [], [])
    title = f"No winner{yet}: no configuration has all its {len(experiment.seeds)} seeds complete."
    leading = experiment.configurations[experiment.configurations["n"] > 0]
    if leading.empty:
        return Answer(title, [], [], ["No trial has completed."])
    first = leading.iloc[0]
    values = labels.settings({key: first[key] for key in experiment.axes})
    score = (
        f"{labels.score(experiment.metric, first['mean'])} on {first['n']} of "
        f"{len(experiment.seeds)} seeds"
    )
    return Answer(
        title, [], [], [f"The best so far is {values or 'the only configuration'}, with {score}."]
    )


def _scored(experiment: Experiment, score: float, found: stats.Interval | None) -> str:
    text = f"{labels.metric(experiment.metric)} {labels.score(experiment.metric, score)}"
    return f"{text} ({_interval_words(experiment, found)})" if found else text


def _interval_words(experiment: Experiment, found: stats.Interval) -> str:
    """`95% interval over 512 problems: 0.266 to 0.349`."""
    return f"{found.source}: {range_words(experiment, found.low, found.high)}"


def _against(experiment: Experiment) -> str:
    base = experiment.base
    return (
        f", against the base's {labels.score(experiment.metric, base)}" if base is not None else ""
    )


def _tiles(
    experiment: Experiment, score: float, found: stats.Interval | None, seeds: int
) -> list[tuple[str, str, str]]:
    name, base, held = labels.metric(experiment.metric), experiment.base, experiment.expected
    kind = "fresh seeds" if experiment.best is not None and experiment.best.confirmed else "seeds"
    note = _interval_words(experiment, found) if found else "no interval: one seed"
    tiles = [
        (
            name,
            labels.score(experiment.metric, score),
            f"mean of {seeds} {kind}" if seeds > 1 else note,
        )
    ]
    if base is not None:
        there = experiment.base_interval
        gain = labels.score(experiment.metric, score - base)
        tiles.append(
            (
                "base model",
                labels.score(experiment.metric, base),
                _interval_words(experiment, there) if there else "",
            )
        )
        tiles.append(("change", gain if gain.startswith("-") else f"+{gain}", "trained − base"))
    if held is not None:
        value = labels.score(experiment.metric, held.estimate.value)
        tiles.append(
            ("expected when run again", value, f"95% interval {_held_range(experiment, held)}")
        )
    return tiles


def _held_range(experiment: Experiment, held: stats_seeds.Held) -> str:
    """The 95% interval of what is expected when run again."""
    return " to ".join(
        labels.score(experiment.metric, end) for end in ends(experiment, held.estimate)
    )


def _again(experiment: Experiment, ranked: pd.DataFrame) -> str:
    """What to expect of the winner when it is run again, corrected for selection bias."""
    held, problems = experiment.expected, experiment.problems
    if held is not None:
        value = labels.score(experiment.metric, held.estimate.value)
        return (
            f"Run again, expect {value} (95% interval {_held_range(experiment, held)}), "
            "corrected for selection bias "
            f"(winner's curse). It rests on {held.how}."
        )
    if len(ranked) < 4 or not problems or ranked["n"].max() > 1:
        return ""
    means = [float(mean) for mean in ranked["mean"]]
    variance = float(ranked["mean"].mean()) * (1 - float(ranked["mean"].mean())) / problems
    drawn = labels.score(experiment.metric, stats_seeds.shrunken(means, variance)[0])
    return (
        f"Run again, expect about {drawn}, corrected for selection bias (winner's "
        "curse). One seed: no interval."
    )


def _clear_of_base(experiment: Experiment, score: float) -> str:
    base = experiment.base
    if base is None:
        return "The base was not evaluated before training, so the gain is unknown."
    if not experiment.better(score, base):
        return "That is no better than the base: training did not help."
    found, there = winner_interval(experiment), experiment.base_interval
    if found is None or there is None:
        return ""
    if found[0] <= there.high and there.low <= found[1]:
        return "Its interval and the base's overlap: the gain may be chance."
    return "Its interval and the base's do not overlap: the gain is more than chance."


def _seeds(experiment: Experiment, first: pd.Series) -> str:
    """How far the winner's seeds differ, whether one collapsed, and how many still could."""
    best, ranking = experiment.best, experiment.ranking
    assert best is not None
    if ranking is None:
        return ""
    collapsed, count = ranking.chosen.collapsed, ranking.chosen.tried
    if collapsed:
        return (
            f"It is unstable: {collapsed} of its {count} seeds collapsed, and lost more "
            "than half of the gain."
        )
    could = f"{could_collapse(count):.0%}"
    if count == 1:
        return (
            f"It has one seed: how far seeds differ is not known, and up to {could} of "
            "them could collapse."
        )
    kind, prefix = ("fresh seeds", "fresh_") if best.confirmed else ("seeds", "")
    low, high = (
        labels.score(experiment.metric, first[f"{prefix}{name}"]) for name in ("min", "max")
    )
    text = f"Its {best.seeds} {kind} gave {low} to {high}. "
    together = (
        f"{count} seeds, those of the sweep included," if best.confirmed else f"{count} seeds"
    )
    return f"{text}None of its {together} collapsed: with 95% confidence at most {could} would" + (
        f"; {seeds_to_bound(COLLAPSE_BOUND)} such seeds bound that at {COLLAPSE_BOUND:.0%}."
        if count < seeds_to_bound(COLLAPSE_BOUND)
        else "."
    )


def _runner_up(experiment: Experiment, ranked: pd.DataFrame) -> list[str]:
    ranking = experiment.ranking
    if len(ranked) < 2 or ranking is None:
        return []
    first, second = ranked.iloc[0], ranked.iloc[1]
    gap = labels.score(experiment.metric, abs(first["score"] - second["score"]))
    behind = f"is {gap} behind" if first["score"] != second["score"] else "ties with it"
    if pd.isna(second["fresh"]) and pd.notna(first["fresh"]):
        behind = "was not run on the fresh seeds"
    text = (
        f"The runner-up ({labels.settings({key: second[key] for key in experiment.axes})}) {behind}"
    )
    if ranking.chosen.score is None:
        return [
            f"{text}. One seed does not tell configurations apart: chance in training is not known."
        ]
    near = len(ranking.others) - len(ranking.of("worse"))
    if not near:
        return [f"{text}. Every other configuration is told apart from the winner."]
    others = labels.plural(len(ranked) - 1, "other configuration")
    return [
        f"{text}. {near} of {others} {'is' if near == 1 else 'are'} not told apart from the winner."
    ]


def _edge(experiment: Experiment, values: dict[str, Any]) -> list[str]:
    if LR not in experiment.axes:
        return []
    basin = (
        experiment.basin(int(values[RANK]))
        if RANK in experiment.trials.columns
        else experiment.basin()
    )
    if basin is None or basin.best is None or len(basin.tested) < 2:
        return []
    at = " at this rank" if RANK in experiment.trials.columns else ""
    for end, word in ((0, "lowest"), (-1, "highest")):
        if float(values[LR]) == basin.tested[end]:
            return [f"Its learning rate is the {word} tested{at}: the best may lie beyond."]
    return []


def _unranked(experiment: Experiment) -> list[str]:
    waiting = experiment.configurations[~experiment.configurations["whole"]]
    if waiting.empty:
        return []
    few = labels.plural(len(waiting), "more configuration")
    what = "did not complete" if len(experiment.seeds) == 1 else "did not complete on every seed"
    what += " of the same inputs" if experiment.inputs_changed else ""
    return [f"{few} {what} and cannot win; the table of configurations shows why."]


def range_words(experiment: Experiment, low: float, high: float) -> str:
    """Two scores in words: `0.912 to 0.955`."""
    return f"{labels.score(experiment.metric, low)} to {labels.score(experiment.metric, high)}"


def _span(rates: tuple[float, ...]) -> str:
    return (
        labels.lr(rates[0])
        if len(rates) == 1
        else f"{labels.lr(rates[0])} to {labels.lr(rates[-1])}"
    )


def _status_order(status: str) -> int:
    order = [Status.COMPLETE, Status.RUNNING, Status.CREATED, Status.PRUNED, Status.FAILED]
    names = [item.value for item in order]
    return names.index(status) if status in names else len(names)
