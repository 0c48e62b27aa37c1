"""Claim 6: the first part of the training curves, at equal learning rates, over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.claims.arm import BASIN_SHARE, LEARNED, Floats
from analysis.claims.claim import Block, Finding
from analysis.claims.evidence import Evidence, Mask
from analysis.data.labels import listed
from analysis.stats.effects import Estimate, every, within

# Early is until the average curve has made this share of its rise.
EARLY_SHARE = 0.5
# The shortest window, in steps, and what a curve's beginning and end are averaged over.
MIN_STEPS = 3
SMOOTHING = 3
# Early curves that differ by less than this share of the early rise are the same.
CURVE_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Early:
    """Training reward per rank, block (a learning rate and a seed) and step, `[R, K, T]`; the early
    rise; steps; runs.

    `scores` `[R, K]` is the mean reward of the first `steps`.
    """

    curves: Floats
    scores: Floats
    ranks: list[int]
    rise: float
    steps: int
    runs: int
    seeds: int


def early_curves_agree(e: Evidence) -> Finding | Block:
    """6: equivalence of each rank's early training reward to the other ranks', at the same rates
    and seeds.
    """
    found = early_curves(e)
    return found if isinstance(found, Block) else _judge(found)


def early_curves(e: Evidence) -> Early | Block:
    """The training curves of the ranks at the rates and seeds that they share, and what of them is
    early.
    """
    for stratum in e.strata(e.lora & ~e.bad & ~e.confirm, "batch", "budget", "targets", "alpha"):
        found = _early(e, stratum)
        if found is not None:
            return found
    return Block("no two ranks with training curves at the same learning rate and seed", "")


def leads(early: Early) -> list[Estimate]:
    """Each rank's early reward against the mean of the other ranks'; of two blocks or more."""
    count, blocks = early.scores.shape
    centred = early.scores - early.scores.mean(0, keepdims=True)
    mean = centred.mean(1)
    variance = float(((centred - mean[:, None]) ** 2).sum()) / ((count - 1) * (blocks - 1))
    # A rank less the mean of the others: count / (count - 1) times its lead over the mean of all.
    factor = count / (count - 1)
    error = math.sqrt(variance / blocks * factor)
    return [
        Estimate(float(lead) * factor, error, float((count - 1) * (blocks - 1))) for lead in mean
    ]


def _judge(early: Early) -> Finding | Block:
    if early.scores.shape[1] < 2:
        return Block("the ranks share fewer than two seeds", "")
    effects = leads(early)
    margin = CURVE_SHARE * early.rise
    furthest = max(effects, key=lambda effect: abs(effect.value))
    each = listed(
        [
            f"rank {rank} {effect.value:+.3f}"
            for rank, effect in zip(early.ranks, effects, strict=True)
        ]
    )
    reading = (
        f"In the first {early.steps} steps, until the average curve has made half its "
        "rise, the mean training reward "
        f"against the other ranks' is {each}, of an early rise of {early.rise:.3f}."
    )
    return Finding(
        furthest,
        "training reward",
        every([within(effect, -margin, margin) for effect in effects]),
        f"±{margin:.3f} ({CURVE_SHARE:.0%} of the early rise)",
        math.copysign(margin, furthest.value),
        early.runs,
        early.seeds,
        reading,
    )


def _early(e: Evidence, stratum: Mask) -> Early | Block | None:
    """The early scores at every rate at which each rank is within its basin; None where ranks share
    no rate.
    """
    ranks = e.ranks(stratum)
    # Beside longer runs of other settings these have no rewards at the end.
    curves = e.curves[:, np.isfinite(e.curves[stratum]).any(0)]
    if len(ranks) < 2 or curves.shape[1] < 2 * MIN_STEPS:
        return None
    stacks = []
    for rate in _shared_rates(e, stratum, ranks):
        here = stratum & (e.lr == rate)
        seeds = [set(e.seed[here & (e.rank == rank)]) for rank in ranks]
        for seed in sorted(set.intersection(*seeds)):
            rows = [
                np.flatnonzero(here & (e.rank == rank) & (e.seed == seed))[-1] for rank in ranks
            ]
            stacks.append((rate, seed, curves[rows]))
    whole = [(rate, seed, block) for rate, seed, block in stacks if np.isfinite(block).all()]
    if not whole:
        return None
    table = np.stack([block for _, _, block in whole], axis=1)  # [R, K, T]
    return _window(table, ranks, len({seed for _, seed, _ in whole}))


def _window(table: Floats, ranks: list[int], seeds: int) -> Early | Block:
    """The window that is early on the average of all curves `[R, K, T]`, and the curves' means in
    it.
    """
    average = table.mean((0, 1))
    smooth = np.convolve(average, np.ones(SMOOTHING) / SMOOTHING, mode="valid")
    start, rise = float(smooth[0]), float(smooth[-SMOOTHING:].mean() - smooth[0])
    spread = table[:, :, -SMOOTHING:].mean(2).reshape(-1)
    if rise <= LEARNED * float(spread.std(ddof=1)) / math.sqrt(len(spread)):
        return Block(
            "the training reward did not rise by more than chance",
            "longer runs, or other learning rates",
        )
    steps = max(
        MIN_STEPS, int((smooth >= start + EARLY_SHARE * rise).argmax()) + SMOOTHING // 2 + 1
    )
    scores = table[:, :, :steps].mean(2)
    early_rise = float(scores.mean()) - start
    if early_rise <= 0:
        return Block(
            "the training reward rose too fast to see an early part", "lower learning rates"
        )
    return Early(table, scores, ranks, early_rise, steps, table.shape[0] * table.shape[1], seeds)


def _shared_rates(e: Evidence, stratum: Mask, ranks: list[int]) -> list[float]:
    """The rates that all ranks ran and at which each kept its basin's share of the best gain of
    any.
    """
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
