"""Two models on the same held-out problems: paired differences, whose samples of one problem are no
fresh evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from statsmodels.regression.linear_model import OLS

from analysis.stats.effects import Estimate


@dataclass(frozen=True, slots=True)
class Paired:
    """The mean difference per problem, first less second, with its clustered error; how much rests
    on what.
    """

    effect: Estimate
    questions: int
    seeds: int
    correlation: float


def outcomes(samples: pd.DataFrame, last: bool = True) -> pd.DataFrame:
    """Rewards per run and held-out problem, the mean over a problem's samples: of each run's last
    evaluation.

    Columns directory, run_dir, seed, index, reward. `last=False` takes the base's, before training.
    """
    held = samples[samples["phase"] == "eval"]
    by_run = held.groupby(["directory", "run_dir"])["step"]
    wanted = held[held["step"] == (by_run.transform("max") if last else 0)]
    keys = ["directory", "run_dir", "seed", "index"]
    return wanted.groupby(keys)["reward"].mean().reset_index()


def paired_difference(first: pd.DataFrame, second: pd.DataFrame) -> Paired | None:
    """Difference in reward on the problems and seeds both answered, errors clustered by problem
    (Miller 2024).

    Each has columns index, seed, reward: a row per problem and seed. The seeds' answers to one
    problem are one cluster; chance in training is not in this error, only the seeds' own
    differences show it. None with fewer than two problems.
    """
    both = first.merge(second, on=["index", "seed"], suffixes=("_first", "_second"))
    codes = pd.factorize(both["index"])[0]
    questions = int(codes.max()) + 1 if len(codes) else 0
    if questions < 2:
        return None
    gaps = (both["reward_first"] - both["reward_second"]).to_numpy(float)
    fit = OLS(gaps, np.ones(len(gaps))).fit(cov_type="cluster", cov_kwds={"groups": codes})
    varied = both["reward_first"].std() > 0 and both["reward_second"].std() > 0
    correlation = (
        float(both["reward_first"].corr(both["reward_second"])) if varied else float("nan")
    )
    effect = Estimate(float(fit.params[0]), float(fit.bse[0]), float(questions - 1))
    return Paired(effect, questions, int(both["seed"].nunique()), correlation)
