"""Simulated sweeps as experiments: tables as if read from run directories, with the simulation's
known truth.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from analysis.claims.evidence import Evidence
from analysis.experiment import Experiment
from harness.records.run_dir import Status
from tests.unit.analysis.figures.made import made
from tests.unit.analysis.simulation import BASE, PER_STEP, STEPS, World

METRIC = "eval/accuracy"
PROBLEMS = 512
EVERY = 4  # steps between evaluations
LOST_AT = 8  # the last step of a run that failed
TOKENS = 8_000.0  # a step
FLOPS_PER_TOKEN = 4_500_000.0
# What every step and every evaluation log besides, the same for all.
TRAINED = {
    "step_time": 1.0,
    "timing_s/rollout": 0.6,
    "timing_s/logprobs": 0.1,
    "timing_s/update": 0.2,
    "timing_s/sync": 0.1,
    "perf/members": 1.0,
    "entropy": 0.8,
    "kl": 0.01,
    "completions/mean_length": 30.0,
    "frac_reward_zero_std": 0.2,
    "sampling/sampling_logp_difference/mean": 1e-5,
    "sampling/sampling_logp_difference/max": 1e-4,
}
EVALUATED = {
    "timing_s/eval": 0.5,
    "lora/norm_A": 2.0,
    "lora/norm_B": 0.5,
    "lora/effective_rank": 1.2,
}


def experiment(world: World, seed: int = 0) -> Experiment:
    """One sweep of a world as an experiment: failed runs are FAILED, of the diverged ones every
    second has a score.
    """
    return of(world.draw(np.random.default_rng(seed), curves=True))


def of(e: Evidence) -> Experiment:
    """Evidence with training curves as an experiment's tables."""
    trials = [_trial(e, number) for number in range(len(e.rank))]
    steps = [row for number, trial in enumerate(trials) for row in _steps(e, number, trial)]
    return made(trials, steps, metric=METRIC, problems=PROBLEMS)


def _trial(e: Evidence, number: int) -> dict[str, Any]:
    lost, full = math.isnan(e.score[number]), bool(e.rank[number] == 0)
    score = None if lost else _share(e.score[number])
    return {
        "rank": int(e.rank[number]),
        "alpha": 32.0 if full else float(e.alpha[number]),
        # Equal rates of several arms are to be equal to the bit, as a recipe's are.
        "lr": float(f"{e.lr[number]:.6g}"),
        "targets": "all-linear" if full else e.target_names[int(e.targets[number])],
        "batch_size": int(e.batch[number]),
        "seed": int(e.seed[number]),
        "status": (Status.FAILED if lost else Status.COMPLETE).value,
        "score": score,
        "last": 0.1 if e.bad[number] and number % 2 == 0 else score,
        "base": _share(BASE),
        "diverged": bool(e.bad[number]),
        "parameters": int(e.parameters[number]),
        "model_parameters": int(e.model_parameters),
        "rule_lr": e.rule_lr,
        "step": LOST_AT if lost else STEPS,
        "seconds": 60.0,
        "started": 60.0 * number,
        "ended": 60.0 * (number + 1),
    }


def _steps(e: Evidence, number: int, trial: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per step: what training logs, and an evaluation every so many steps, the last one the
    score.
    """
    found, evaluations = [], 0
    for step in range(trial["step"] + 1):
        row: dict[str, Any] = {"number": number, "step": step, "episodes": step * PER_STEP}
        if step:
            row |= {"reward": e.curves[number, step - 1], "num_tokens": step * TOKENS, **TRAINED}
            row["flops"] = row["num_tokens"] * FLOPS_PER_TOKEN * (1.0 if trial["rank"] else 1.5)
        if step % EVERY == 0:
            evaluations += 1
            held = e.curves[number, step - 1] if step else trial["base"]
            row |= {METRIC: trial["score"] if step == STEPS else held, **EVALUATED}
        row["seconds"] = step * TRAINED["step_time"] + evaluations * EVALUATED["timing_s/eval"]
        found.append(row)
    return found


def _share(score: float) -> float:
    """A score as a share of whole problems."""
    return round(float(score) * PROBLEMS) / PROBLEMS
