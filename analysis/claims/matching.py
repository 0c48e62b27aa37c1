"""Judge the claims about scores: who reaches whom, each arm at its own best learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.claims.arm import BASIN_SHARE, Arm, width
from analysis.claims.claim import (
    Finding,
    Obstacle,
    gained,
    gap,
    kept,
    not_learned,
    points,
    too_few_seeds,
    untuned,
)
from analysis.claims.evidence import ALL, ATTENTION, MLP, Evidence, Mask
from analysis.data import labels
from analysis.stats.effects import (
    GAIN_SHARE,
    Estimate,
    average,
    better,
    difference,
    equivalent,
    every,
    no_worse,
)

# A basin less than this many decades wider is no wider: a factor of 1.26 in learning rate.
WIDER = 0.1
# Two arms whose parameters differ by less than this factor have as many.
SAME_PARAMETERS = 1.25
# An adapter's parameter holds this many bits; an episode teaches one (LoRA Without Regret).
BITS_PER_PARAMETER = 2


@dataclass(frozen=True, slots=True)
class Placed:
    """An arm on some target modules, its rank and its trained parameters (0 where unknown)."""

    arm: Arm
    rank: int
    parameters: float


@dataclass(frozen=True, slots=True)
class ArmPair:
    """Two arms that differ in their target modules and are otherwise comparable."""

    first: Placed
    second: Placed


def rank_one_reaches(e: Evidence) -> Finding | Obstacle:
    """1a: non-inferiority of rank 1's best score to full fine-tuning's."""
    pair = _one_and_full(e)
    if isinstance(pair, Obstacle):
        return pair
    rank_1, full = pair
    effect = gap(rank_1, full)
    assert effect is not None  # both arms have a peak
    margin = GAIN_SHARE * gained(full)
    return Finding(
        effect=effect,
        unit=e.metric,
        outcome=no_worse(kept(rank_1, full, 1 - GAIN_SHARE)),
        margin=_margin(margin, "full fine-tuning's gain"),
        bound=-margin,
        n=rank_1.runs + full.runs,
        seeds=min(rank_1.seeds, full.seeds),
        reading=(
            f"At their best learning rates rank 1 is at {points(effect.value)} against full "
            f"fine-tuning, which gained {gained(full):.3f}. It falls short by at most "
            f"{max(0.0, -effect.interval()[0]):.3f}."
        ),
        against_holds=untuned(full, "full fine-tuning"),
        against_fails=untuned(rank_1, "rank 1"),
    )


def rank_one_is_wider(e: Evidence) -> Finding | Obstacle:
    """1b: the widths of rank 1's and full fine-tuning's basins."""
    pair = _one_and_full(e)
    if isinstance(pair, Obstacle):
        return pair
    rank_1, full = pair
    if full.basin is None:
        return Obstacle(
            "full fine-tuning's basin is cut off by the ends of the tested rates",
            "add learning rates on the side where full fine-tuning is still good",
        )
    if rank_1.seeds < 2 or not rank_1.learned:
        return Obstacle("rank 1 has fewer than two seeds, or did not learn")
    cut_off = rank_1.basin is None
    wide, at_least = _width_in_grid(rank_1), "at least " if cut_off else ""
    effect = difference(wide, width(full.basin))
    beyond = Obstacle(
        "rank 1's basin extends beyond the tested rates",
        "add learning rates beyond rank 1's good ones",
    )
    return Finding(
        effect=effect,
        unit="decades of learning rate",
        outcome=better(effect, effect.scaled(-1.0).shifted(WIDER)),
        margin=f"{WIDER} decades",
        bound=0.0,
        n=rank_1.runs + full.runs,
        seeds=min(rank_1.seeds, full.seeds),
        reading=(
            f"Rank 1 keeps {BASIN_SHARE:.0%} of its gain over {at_least}{wide.value:.2f} decades "
            f"of learning rate, full fine-tuning over {width(full.basin).value:.2f}."
        ),
        against_fails=beyond if cut_off else None,
    )


def attention_is_worse(e: Evidence) -> Finding | Obstacle:
    """4a: MLP-only less attention-only at equal trained parameters, over all such pairs."""
    for stratum in e.strata(e.lora, "batch", "budget", "alpha"):
        pairs = equal_parameters(e, stratum, MLP, ATTENTION)
        if pairs:
            return _placements(e, pairs, "MLP-only", "attention-only", tost=False)
    return Obstacle(
        "no attention-only and MLP-only runs have trained parameters within a factor of "
        f"{SAME_PARAMETERS} of each other"
    )


def all_is_like_mlp(e: Evidence) -> Finding | Obstacle:
    """4b: equivalence of all layers and MLP-only at equal rank."""
    for stratum in e.strata(e.lora, "batch", "budget", "alpha"):
        pairs = equal_rank(e, stratum, ALL, MLP)
        if pairs:
            return _placements(e, pairs, "all layers", "MLP-only", tost=True)
    return Obstacle("no all-linear and MLP-only runs have the same rank")


def large_batches_hurt(e: Evidence) -> Finding | Obstacle:
    """5: what the larger batch costs each rank, less what it costs full fine-tuning."""
    for stratum in e.strata(e.lora, "targets", "alpha"):
        sizes = {
            size: arms for size, arms in by_batch(e, stratum).items() if 0 in arms and len(arms) > 1
        }
        if len(sizes) < 2:
            continue
        shared = [rank for rank in sizes[min(sizes)] if rank in sizes[max(sizes)]]
        if len(shared) > 1:
            return _batch_costs(e, sizes, shared)
    return Obstacle("no two batch sizes have runs of both LoRA and full fine-tuning")


def capacity_is_spare(e: Evidence) -> Finding | Obstacle:
    """8: non-inferiority of every adapter with spare bits to the largest."""
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "alpha"):
        arms = e.arms(stratum, e.ranks(stratum))
        sizes = {rank: e.size(stratum & (e.rank == rank)) for rank in arms}
        taught = float(np.nanmax(e.episodes[stratum], initial=0))
        spare = [rank for rank in arms if taught and BITS_PER_PARAMETER * sizes[rank] >= taught]
        if len(spare) > 1:
            return _capacity(e, arms, sizes, spare, taught)
    return Obstacle("fewer than two ranks have parameters to hold what the episodes teach")


def _one_and_full(e: Evidence) -> tuple[Arm, Arm] | Obstacle:
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "alpha"):
        rank_1, full = e.arm(stratum & (e.rank == 1)), e.arm(e.full_like(stratum))
        if rank_1 is not None and full is not None:
            # That rank 1 did not learn is a result, and no obstacle.
            return (
                not_learned(full, "full fine-tuning")
                or (too_few_seeds("rank 1") if rank_1.peak is None else None)
                or (rank_1, full)
            )
    return Obstacle(
        "there are no runs of both rank 1 and full fine-tuning at the same batch size and length"
    )


def _width_in_grid(arm: Arm) -> Estimate:
    """Return an arm's basin width; where the basin goes beyond the grid, up to the grid's end."""
    if arm.basin is not None:
        return width(arm.basin)
    left, right, _, _ = arm.ends
    first, last = arm.log_lr[0], arm.log_lr[-1]
    seen = np.where(np.isfinite(right), right, last) - np.where(np.isfinite(left), left, first)
    error = float(seen.std(ddof=1)) / math.sqrt(len(seen))
    return Estimate(float(seen.mean()), error, len(seen) - 1.0)


def equal_rank(e: Evidence, stratum: Mask, first: float, second: float) -> list[ArmPair]:
    """Pair arms of two sets of target modules at each rank that both ran."""
    ones, others = _by_rank(e, stratum, first), _by_rank(e, stratum, second)
    return [ArmPair(ones[rank], others[rank]) for rank in sorted(set(ones) & set(others))]


def equal_parameters(e: Evidence, stratum: Mask, first: float, second: float) -> list[ArmPair]:
    """Pair arms of two sets of target modules with about as many parameters, nearest first."""
    sides = [
        [arm for arm in _by_rank(e, stratum, code).values() if arm.parameters > 0]
        for code in (first, second)
    ]
    near = sorted(
        (abs(math.log(arm.parameters / other.parameters)), i, j)
        for i, arm in enumerate(sides[0])
        for j, other in enumerate(sides[1])
    )
    pairs: list[ArmPair] = []
    used: set[tuple[int, int]] = set()
    for distance, i, j in near:
        if distance <= math.log(SAME_PARAMETERS) and not used & {(0, i), (1, j)}:
            used |= {(0, i), (1, j)}
            pairs.append(ArmPair(sides[0][i], sides[1][j]))
    return pairs


def _by_rank(e: Evidence, stratum: Mask, code: float) -> dict[int, Placed]:
    """Return the arm of one set of target modules at each rank."""
    here = stratum & (e.targets == code)
    arms = e.arms(here, e.ranks(here))
    return {rank: Placed(arm, rank, e.size(here & (e.rank == rank))) for rank, arm in arms.items()}


def _placements(
    e: Evidence, placed: list[ArmPair], first: str, second: str, *, tost: bool
) -> Finding | Obstacle:
    pairs = [(pair.first.arm, pair.second.arm) for pair in placed]
    for arm, other in pairs:
        obstacle = not_learned(arm, first) or (not_learned(other, second) if tost else None)
        if obstacle is not None:
            return obstacle
    gaps = [effect for arm, other in pairs if (effect := gap(arm, other)) is not None]
    if len(gaps) < len(pairs):
        return too_few_seeds(second)
    effect = average(gaps)
    reference = float(np.mean([gained(other if tost else arm) for arm, other in pairs]))
    margin = GAIN_SHARE * reference
    over = f" over {len(pairs)} pairs of ranks" if len(pairs) > 1 else ""
    first_edge = next((edge for arm, _ in pairs if (edge := untuned(arm, first))), None)
    second_edge = next((edge for _, two in pairs if (edge := untuned(two, second))), None)
    least = average([kept(arm, other, 1 - GAIN_SHARE) for arm, other in pairs])
    most = average([kept(arm, other, 1 + GAIN_SHARE) for arm, other in pairs])
    lag = average([kept(other, arm, 1 - GAIN_SHARE) for arm, other in pairs])
    either = first_edge or second_edge
    return Finding(
        effect=effect,
        unit=e.metric,
        outcome=equivalent(least, most) if tost else better(effect, lag),
        margin=_margin(margin, "MLP-only's gain"),
        bound=math.copysign(margin, effect.value) if tost else 0.0,
        n=sum(arm.runs + other.runs for arm, other in pairs),
        seeds=min(min(arm.seeds, other.seeds) for arm, other in pairs),
        reading=(
            f"At their best learning rates {first} is at {points(effect.value)} against {second}"
            f"{over}; MLP-only gained {reference:.3f}."
        ),
        against_holds=either if tost else second_edge,
        against_fails=either if tost else first_edge,
    )


def by_batch(e: Evidence, stratum: Mask) -> dict[float, dict[int, Arm]]:
    """Return arms by batch size and rank (0 for full fine-tuning).

    Each size has runs of one length: full fine-tuning's, where it ran.
    """
    sizes = {}
    for size in np.unique(e.batch[stratum]):
        parts = list(e.strata(stratum & (e.batch == size), "budget"))
        if parts:
            part = next((part for part in parts if e.full_like(part).any()), parts[0])
            full = e.arm(e.full_like(part))
            whole = {0: full} if full is not None else {}
            sizes[float(size)] = whole | e.arms(part, e.ranks(part))
    return sizes


def _batch_costs(
    e: Evidence, sizes: dict[float, dict[int, Arm]], ranks: list[int]
) -> Finding | Obstacle:
    small, large = sizes[min(sizes)], sizes[max(sizes)]
    for rank in ranks:
        if obstacle := not_learned(small[rank], labels.rank(rank)):
            return obstacle
    costs = {rank: cost for rank in ranks if (cost := gap(small[rank], large[rank])) is not None}
    if len(costs) < len(ranks):
        return too_few_seeds("an arm")
    margin = GAIN_SHARE * gained(small[0])
    effects = {rank: difference(cost, costs[0]) for rank, cost in costs.items() if rank}
    lacks = [effect.scaled(-1.0).shifted(margin) for effect in effects.values()]
    outcomes = [better(*both) for both in zip(effects.values(), lacks, strict=True)]
    each = [f"{labels.rank(rank)} {points(effect.value)}" for rank, effect in effects.items()]
    arms = [(rank, arms[rank]) for arms in (small, large) for rank in ranks]
    edges = [edge for rank, arm in arms if (edge := untuned(arm, labels.rank(rank), coarse=False))]
    edge = edges[0] if edges else None
    return Finding(
        effect=min(effects.values(), key=lambda effect: effect.value),
        unit=e.metric,
        outcome=every(outcomes),
        margin=_margin(margin, "full fine-tuning's gain"),
        bound=0.0,
        n=sum(arm.runs for _, arm in arms),
        seeds=min(arm.seeds for _, arm in arms),
        reading=(
            f"Going from {min(sizes):g} to {max(sizes):g} sequences an update costs full "
            f"fine-tuning {costs[0].value:.3f}. Beyond that it costs {labels.listed(each)}."
        ),
        against_holds=edge,
        against_fails=edge,
    )


def _capacity(
    e: Evidence, arms: dict[int, Arm], sizes: dict[int, float], spare: list[int], taught: float
) -> Finding | Obstacle:
    last = sorted(arms, key=lambda rank: sizes[rank])[-1]
    largest = arms[last]
    if obstacle := not_learned(largest, f"rank {last}"):
        return obstacle
    margin = GAIN_SHARE * gained(largest)
    smaller = [rank for rank in spare if rank != last]
    effects = {rank: gap(arms[rank], largest) for rank in smaller}
    known = {rank: effect for rank, effect in effects.items() if effect is not None}
    if len(known) < len(effects):
        return too_few_seeds("a rank")
    least = min(known, key=lambda rank: known[rank].value)
    return Finding(
        effect=known[least],
        unit=e.metric,
        outcome=every([no_worse(kept(arms[rank], largest, 1 - GAIN_SHARE)) for rank in known]),
        margin=_margin(margin, f"rank {last}'s gain"),
        bound=-margin,
        n=sum(arms[rank].runs for rank in {*spare, last}),
        seeds=min(arm.seeds for arm in arms.values()),
        reading=(
            f"{taught:.0f} episodes teach at most as many bits, which every rank from {spare[0]} "
            f"on holds. The lowest of these against rank {last} is rank {least} at "
            f"{points(known[least].value)}."
        ),
        against_holds=untuned(largest, f"rank {last}"),
        against_fails=next(
            (b for rank in known if (b := untuned(arms[rank], f"rank {rank}"))), None
        ),
    )


def _margin(margin: float, of: str) -> str:
    return f"{margin:.3f} ({GAIN_SHARE:.0%} of {of})"
