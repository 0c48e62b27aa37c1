"""Judge claim 6: the first part of the training curves at equal learning rates, over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.claims.arm import BASIN_SHARE, LEARNED, Floats
from analysis.claims.claim import Finding, Obstacle
from analysis.claims.evidence import Evidence, Mask
from analysis.data.labels import listed
from analysis.stats.effects import Estimate, every, within

# Early lasts until the average curve has made this share of its rise.
EARLY_SHARE = 0.5
# The shortest early part, and what a curve's beginning and end are averaged over, in steps.
MIN_STEPS = 3
SMOOTHING = 3
# Early curves that differ by less than this share of the early rise are the same.
CURVE_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Early:
    """Training reward `[R, K, T]` per rank, pair of learning rate and seed, and step.

    `scores` `[R, K]` is the mean reward of the first `steps`; `rise` is the early rise.
    """

    curves: Floats
    scores: Floats
    ranks: list[int]
    rise: float
    steps: int
    runs: int
    seeds: int


def early_curves_agree(e: Evidence) -> Finding | Obstacle:
    """6: equivalence of each rank's early reward to the others', at the same rates and seeds."""
    early = early_curves(e)
    if isinstance(early, Obstacle):
        return early
    if early.scores.shape[1] < 2:
        return Obstacle("the ranks share fewer than two seeds")
    effects = leads(early)
    margin = CURVE_SHARE * early.rise
    furthest = max(effects, key=lambda effect: abs(effect.value))
    pairs = zip(early.ranks, effects, strict=True)
    each = listed([f"rank {rank} {effect.value:+.3f}" for rank, effect in pairs])
    return Finding(
        effect=furthest,
        unit="training reward",
        outcome=every([within(effect, -margin, margin) for effect in effects]),
        margin=f"±{margin:.3f} ({CURVE_SHARE:.0%} of the early rise)",
        bound=math.copysign(margin, furthest.value),
        n=early.runs,
        seeds=early.seeds,
        reading=(
            f"The average curve makes half of its rise in the first {early.steps} steps. There the "
            f"mean training reward against the other ranks' is {each}, of an early rise of "
            f"{early.rise:.3f}."
        ),
    )


def early_curves(e: Evidence) -> Early | Obstacle:
    """Return the training curves of the ranks at the rates and seeds that they share."""
    for stratum in e.strata(e.lora & ~e.bad & ~e.confirm, "batch", "budget", "targets", "alpha"):
        early = _early(e, stratum)
        if early is not None:
            return early
    return Obstacle("no two ranks have training curves at the same learning rate and seed")


def leads(early: Early) -> list[Estimate]:
    """Return each rank's early reward less the mean of the other ranks'; needs two pairs."""
    count, pairs = early.scores.shape
    centred = early.scores - early.scores.mean(0, keepdims=True)
    mean = centred.mean(1)
    df = float((count - 1) * (pairs - 1))
    variance = float(((centred - mean[:, None]) ** 2).sum()) / df
    # A rank less the mean of the others is this many times its lead over the mean of all.
    factor = count / (count - 1)
    error = math.sqrt(variance / pairs * factor)
    return [Estimate(float(lead) * factor, error, df) for lead in mean]


def _early(e: Evidence, stratum: Mask) -> Early | Obstacle | None:
    """Return the early scores at the shared rates; None where ranks share no rate."""
    ranks = e.ranks(stratum)
    # Longer runs of other settings leave columns at the end that these runs do not have.
    curves = e.curves[:, np.isfinite(e.curves[stratum]).any(0)]
    if len(ranks) < 2 or curves.shape[1] < 2 * MIN_STEPS:
        return None
    stacks = []
    for rate in _shared_rates(e, stratum, ranks):
        here = stratum & (e.lr == rate)
        seeds = [set(e.seed[here & (e.rank == rank)]) for rank in ranks]
        for seed in sorted(set.intersection(*seeds)):
            of_seed = here & (e.seed == seed)
            rows = [np.flatnonzero(of_seed & (e.rank == rank))[-1] for rank in ranks]
            if np.isfinite(curves[rows]).all():
                stacks.append((seed, curves[rows]))
    if not stacks:
        return None
    table = np.stack([block for _, block in stacks], axis=1)  # [R, K, T]
    average = table.mean((0, 1))
    smooth = np.convolve(average, np.ones(SMOOTHING) / SMOOTHING, mode="valid")
    start, rise = float(smooth[0]), float(smooth[-SMOOTHING:].mean() - smooth[0])
    final = table[:, :, -SMOOTHING:].mean(2).reshape(-1)
    if rise <= LEARNED * float(final.std(ddof=1)) / math.sqrt(len(final)):
        return Obstacle(
            "the training reward did not rise by more than chance",
            "longer runs, or other learning rates",
        )
    half = int((smooth >= start + EARLY_SHARE * rise).argmax()) + SMOOTHING // 2 + 1
    steps = max(MIN_STEPS, half)
    scores = table[:, :, :steps].mean(2)
    early_rise = float(scores.mean()) - start
    if early_rise <= 0:
        return Obstacle(
            "the training reward rose too fast to see an early part", "lower learning rates"
        )
    runs, seeds_used = table.shape[0] * table.shape[1], len({seed for seed, _ in stacks})
    return Early(table, scores, ranks, early_rise, steps, runs, seeds_used)


def _shared_rates(e: Evidence, stratum: Mask, ranks: list[int]) -> list[float]:
    """Return the rates at which every rank ran and kept the basin's share of the best gain."""
    means: dict[float, list[float]] = {}
    for rank in ranks:
        mine = stratum & (e.rank == rank) & np.isfinite(e.score)
        for rate in np.unique(e.lr[mine]):
            means.setdefault(float(rate), []).append(float(e.score[mine & (e.lr == rate)].mean()))
    shared = {rate: scores for rate, scores in means.items() if len(scores) == len(ranks)}
    if not shared:
        return []
    floor = e.base if math.isfinite(e.base) else min(min(scores) for scores in means.values())
    level = floor + BASIN_SHARE * (max(max(scores) for scores in means.values()) - floor)
    return [rate for rate, scores in sorted(shared.items()) if min(scores) >= level]
