"""Compare two models on the same held-out problems by paired differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from statsmodels.regression.linear_model import OLS

from analysis.stats.effects import Estimate


@dataclass(frozen=True, slots=True)
class Paired:
    """The mean difference in reward, first less second, and the problems and seeds it rests on."""

    effect: Estimate
    problems: int
    seeds: int


def final_rewards(samples: pd.DataFrame) -> pd.DataFrame:
    """Return the mean reward per run and held-out problem in each run's last evaluation.

    Columns: directory, run_dir, seed, index, reward.
    """
    held = samples[samples["phase"] == "eval"]
    last = held["step"] == held.groupby(["directory", "run_dir"])["step"].transform("max")
    keys = ["directory", "run_dir", "seed", "index"]
    return held[last].groupby(keys)["reward"].mean().reset_index()


def paired_difference(first: pd.DataFrame, second: pd.DataFrame) -> Paired | None:
    """Return the difference in reward on shared problems and seeds, errors clustered by problem.

    Each table has a row per problem and seed: index, seed, reward. The answers to one problem are
    one cluster (Miller 2024). The error does not contain chance in training. None with fewer than
    two problems.
    """
    both = first.merge(second, on=["index", "seed"], suffixes=("_first", "_second"))
    codes, problems = pd.factorize(both["index"])
    if len(problems) < 2:
        return None
    gaps = (both["reward_first"] - both["reward_second"]).to_numpy(float)
    fit = OLS(gaps, np.ones(len(gaps))).fit(cov_type="cluster", cov_kwds={"groups": codes})
    effect = Estimate(float(fit.params[0]), float(fit.bse[0]), len(problems) - 1.0)
    return Paired(effect, len(problems), int(both["seed"].nunique()))


def mean_over_problems(values: pd.Series) -> Estimate:
    """Return the mean of a value per problem, with its error over two problems or more."""
    count = len(values)
    return Estimate(float(values.mean()), float(values.std()) / count**0.5, count - 1.0)
