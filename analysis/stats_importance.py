"""Which setting mattered how much, through Optuna, with the seed as a setting of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from harness.config.metrics import Direction

optuna.logging.set_verbosity(optuna.logging.WARNING)
SEED = "seed"
# Fewer runs than this give a forest nothing to split.
MIN_RUNS = 8


def importance(
    runs: pd.DataFrame, keys: Sequence[str], direction: Direction, *, score: str = "score"
) -> pd.DataFrame:
    """A row per key and for the seed: `fanova`, its share of the scores' variance alone (Hutter et
    al. 2014), and `ped_anova`, its share of what tells the best tenth from the rest (Watanabe et
    al. 2023), which sums to 1.

    `attrs["interactions"]` is the variance that no key explains alone, `attrs["noise"]` the share
    between runs that differ in their seed alone. Empty with fewer than `MIN_RUNS` scored runs,
    equal scores, or keys that never vary.
    """
    scored = runs[runs[score].notna()]
    varied = [
        key
        for key in (*keys, SEED)
        if key in scored.columns and scored[key].nunique(dropna=False) > 1
    ]
    if len(scored) < MIN_RUNS or not varied or scored[score].nunique() < 2:
        return pd.DataFrame(columns=["key", "fanova", "ped_anova"])
    study = _study(scored, varied, direction, score)
    fanova = FanovaImportanceEvaluator(seed=0).evaluate(study, params=varied)
    ped_anova = PedAnovaImportanceEvaluator().evaluate(study, params=varied)
    whole = sum(ped_anova.values())
    rows = [
        {
            "key": key,
            "fanova": float(fanova[key]),
            "ped_anova": float(ped_anova[key] / whole) if whole else math.nan,
        }
        for key in varied
    ]
    table = pd.DataFrame(rows).sort_values("fanova", ascending=False, ignore_index=True)
    table.attrs["interactions"] = max(0.0, 1.0 - float(table["fanova"].sum()))
    table.attrs["noise"] = _noise(scored, [key for key in varied if key != SEED], score)
    return table


def _study(
    scored: pd.DataFrame, keys: Sequence[str], direction: Direction, score: str
) -> optuna.Study:
    distributions = {key: _distribution(key, scored[key]) for key in keys}
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.RandomSampler(seed=0))
    for _, row in scored.iterrows():
        params = {key: _value(row[key], distributions[key]) for key in keys}
        study.add_trial(
            create_trial(params=params, distributions=dict(distributions), value=float(row[score]))
        )
    return study


def _distribution(key: str, column: pd.Series) -> BaseDistribution:
    """A learning rate is a number on a log scale; all else is a choice: full fine-tuning is no rank
    among others.
    """
    if key.rsplit(".", 1)[-1] == "lr":
        return FloatDistribution(float(column.min()), float(column.max()), log=True)
    return CategoricalDistribution(sorted({_choice(value) for value in column}))


def _value(value: Any, distribution: BaseDistribution) -> Any:
    return float(value) if isinstance(distribution, FloatDistribution) else _choice(value)


def _choice(value: Any) -> str:
    return "none" if pd.isna(value) else str(value)


def _noise(scored: pd.DataFrame, keys: Sequence[str], score: str) -> float:
    """The share of the scores' sum of squares that is within configurations; NaN where none has
    several runs.
    """
    total = float(((scored[score] - scored[score].mean()) ** 2).sum())
    groups = scored.groupby(list(keys), dropna=False)[score] if keys else None
    means = (
        groups.transform("mean")
        if groups is not None
        else pd.Series(scored[score].mean(), index=scored.index)
    )
    if groups is not None and (groups.size() < 2).all():
        return math.nan
    return float(((scored[score] - means) ** 2).sum()) / total
