"""Claims about scores: who reaches whom, each arm at its own best learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.claims.arm import BASIN_SHARE, Arm, width
from analysis.claims.claim import (
    GAIN_SHARE,
    Block,
    Finding,
    gained,
    gap,
    kept,
    not_learned,
    points,
    untuned,
)
from analysis.claims.evidence import ALL, ATTENTION, MLP, Evidence, Mask
from analysis.data.labels import listed
from analysis.stats.effects import (
    Estimate,
    average,
    better,
    difference,
    equivalent,
    every,
    no_worse,
)

# A basin less than this wider, in decades, is no wider: a factor of 1.26 in learning rate.
WIDER = 0.1
# Two arms whose parameters differ by less than this factor have as many.
SAME_PARAMETERS = 1.25
# What an adapter's parameter holds and an episode teaches, in bits (LoRA Without Regret).
BITS_PER_PARAMETER = 2


@dataclass(frozen=True, slots=True)
class Placed:
    """An arm on some target modules: its rank, and its trained parameters (0 where unknown)."""

    arm: Arm
    rank: int
    parameters: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two arms that differ in their target modules, and in nothing else that matters to the
    comparison.
    """

    first: Placed
    second: Placed


def rank_one_reaches(e: Evidence) -> Finding | Block:
    """1a: non-inferiority of rank 1's best score to full fine-tuning's."""
    pair = _one_and_full(e)
    if isinstance(pair, Block):
        return pair
    one, full = pair
    effect = gap(one, full)
    assert effect is not None  # both arms have a peak
    margin = GAIN_SHARE * gained(full)
    low = effect.interval()[0]
    reading = (
        f"At their best learning rates rank 1 is at {points(effect.value)} against full "
        "fine-tuning, which gained "
        f"{gained(full):.3f}; it falls short by no more than {max(0.0, -low):.3f}."
    )
    return Finding(
        effect,
        e.metric,
        no_worse(kept(one, full, 1 - GAIN_SHARE)),
        _margin(margin, "full fine-tuning's gain"),
        -margin,
        one.runs + full.runs,
        min(one.seeds, full.seeds),
        reading,
        untuned(full, "full fine-tuning"),
        untuned(one, "rank 1"),
    )


def rank_one_is_wider(e: Evidence) -> Finding | Block:
    """1b: the widths of rank 1's and full fine-tuning's basins."""
    pair = _one_and_full(e)
    if isinstance(pair, Block):
        return pair
    one, full = pair
    if full.basin is None:
        return Block(
            "full fine-tuning's basin is cut off by the ends of the tested rates",
            "add learning rates on the side where full fine-tuning is still good",
        )
    if one.seeds < 2 or not one.learned:
        return Block("rank 1 has fewer than two seeds, or did not learn", "")
    wide, cut = _width_at_least(one)
    effect = difference(wide, width(full.basin))
    at_least = "at least " if cut else ""
    reading = (
        f"Rank 1 keeps {BASIN_SHARE:.0%} of its gain over {at_least}{wide.value:.2f} "
        "decades of learning rate, full "
        f"fine-tuning over {width(full.basin).value:.2f}."
    )
    block = Block(
        "rank 1's basin goes on beyond the tested rates",
        "add learning rates beyond rank 1's good ones",
    )
    return Finding(
        effect,
        "decades of learning rate",
        better(effect, effect.scaled(-1.0).shifted(WIDER)),
        f"{WIDER} decades",
        0.0,
        one.runs + full.runs,
        min(one.seeds, full.seeds),
        reading,
        None,
        block if cut else None,
    )


def attention_is_worse(e: Evidence) -> Finding | Block:
    """4a: MLP-only less attention-only at equal trained parameters, over all such pairs of
    ranks.
    """
    for stratum in e.strata(e.lora, "batch", "budget", "alpha"):
        pairs = equal_parameters(e, stratum, MLP, ATTENTION)
        if pairs:
            return _placements(e, pairs, "MLP-only", "attention-only", tost=False)
    return Block(
        "no attention-only and MLP-only runs with trained parameters within a factor of "
        f"{SAME_PARAMETERS} of each other",
        "",
    )


def all_is_like_mlp(e: Evidence) -> Finding | Block:
    """4b: equivalence of all layers and MLP-only at equal rank."""
    for stratum in e.strata(e.lora, "batch", "budget", "alpha"):
        pairs = equal_rank(e, stratum, ALL, MLP)
        if pairs:
            return _placements(e, pairs, "all layers", "MLP-only", tost=True)
    return Block("no all-linear and MLP-only runs at the same rank", "")


def large_batches_hurt(e: Evidence) -> Finding | Block:
    """5: what the larger batch costs each rank, less what it costs full fine-tuning."""
    for stratum in e.strata(e.lora, "targets", "alpha"):
        sides = _smallest_and_largest(by_batch(e, stratum))
        if sides is not None:
            return _batch_costs(e, *sides)
    return Block("no two batch sizes with runs of LoRA and of full fine-tuning", "")


def capacity_is_spare(e: Evidence) -> Finding | Block:
    """8: non-inferiority of every adapter with spare bits to the largest."""
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "alpha"):
        ranks = e.ranks(stratum)
        arms = e.arms(stratum, ranks)
        sizes = {
            rank: float(np.nanmax(e.parameters[stratum & (e.rank == rank)], initial=0))
            for rank in arms
        }
        taught = float(np.nanmax(e.episodes[stratum], initial=0))
        spare = [rank for rank in arms if taught and BITS_PER_PARAMETER * sizes[rank] >= taught]
        if len(spare) > 1:
            return _capacity(e, arms, sizes, spare, taught)
    return Block("fewer than two ranks whose parameters would hold what the episodes teach", "")


def _one_and_full(e: Evidence) -> tuple[Arm, Arm] | Block:
    for stratum in e.strata(e.lora, "batch", "budget", "targets", "alpha"):
        one, full = e.arm(stratum & (e.rank == 1)), e.arm(e.full_like(stratum))
        if one is not None and full is not None:
            return not_learned(full, "full fine-tuning") or not_learned_one(one) or (one, full)
    return Block(
        "no runs of both rank 1 and full fine-tuning at the same batch size and length", ""
    )


def not_learned_one(one: Arm) -> Block | None:
    """That rank 1 has too few seeds; not having learned is a result."""
    return (
        Block("rank 1 has fewer than two seeds at its good learning rates", "")
        if one.peak is None
        else None
    )


def _width_at_least(arm: Arm) -> tuple[Estimate, bool]:
    """An arm's basin width, counted to the grid's end where it goes on beyond, and whether
    it does.
    """
    if arm.basin is not None:
        return width(arm.basin), False
    left, right, _, _ = arm.ends
    seen = np.where(np.isfinite(right), right, arm.log_lr[-1]) - np.where(
        np.isfinite(left), left, arm.log_lr[0]
    )
    return Estimate(
        float(seen.mean()), float(seen.std(ddof=1)) / math.sqrt(len(seen)), len(seen) - 1.0
    ), True


def equal_rank(e: Evidence, stratum: Mask, first: float, second: float) -> list[Pair]:
    """Arms of two sets of target modules at each rank that both ran."""
    ones, others = _by_rank(e, stratum, first), _by_rank(e, stratum, second)
    return [Pair(ones[rank], others[rank]) for rank in sorted(set(ones) & set(others))]


def equal_parameters(e: Evidence, stratum: Mask, first: float, second: float) -> list[Pair]:
    """Arms of two sets of target modules with about as many parameters, each used once, the nearest
    first.
    """
    sides = [
        [arm for arm in _by_rank(e, stratum, code).values() if arm.parameters > 0]
        for code in (first, second)
    ]
    near = sorted(
        (abs(math.log(one.parameters / other.parameters)), i, j)
        for i, one in enumerate(sides[0])
        for j, other in enumerate(sides[1])
    )
    pairs: list[Pair] = []
    used: set[tuple[int, int]] = set()
    for distance, i, j in near:
        if distance <= math.log(SAME_PARAMETERS) and not used & {(0, i), (1, j)}:
            used |= {(0, i), (1, j)}
            pairs.append(Pair(sides[0][i], sides[1][j]))
    return pairs


def _by_rank(e: Evidence, stratum: Mask, code: float) -> dict[int, Placed]:
    """The arm of one set of target modules at each rank, with its trained parameters (0 where
    unknown).
    """
    here = stratum & (e.targets == code)
    arms = e.arms(here, e.ranks(here))
    sizes = {rank: np.nanmax(e.parameters[here & (e.rank == rank)], initial=0) for rank in arms}
    return {rank: Placed(arm, rank, float(sizes[rank])) for rank, arm in arms.items()}


def _placements(
    e: Evidence, placed: list[Pair], first: str, second: str, *, tost: bool
) -> Finding | Block:
    pairs = [(pair.first.arm, pair.second.arm) for pair in placed]
    for one, other in pairs:
        block = not_learned(one, first) or (not_learned(other, second) if tost else None)
        if block is not None:
            return block
    gaps = [gap(one, other) for one, other in pairs]
    known = [found for found in gaps if found is not None]
    if len(known) < len(pairs):
        return Block(f"{second} has fewer than two seeds at its good learning rates", "")
    effect = average(known)
    mlp = [other if tost else one for one, other in pairs]
    reference = float(np.mean([gained(arm) for arm in mlp]))
    margin = GAIN_SHARE * reference
    over = f" over {len(pairs)} pairs of ranks" if len(pairs) > 1 else ""
    reading = (
        f"At their best learning rates {first} is at {points(effect.value)} against "
        f"{second}{over}; MLP-only gained "
        f"{reference:.3f}."
    )
    first_edge = next((b for one, _ in pairs if (b := untuned(one, first))), None)
    second_edge = next((b for _, two in pairs if (b := untuned(two, second))), None)
    least = average([kept(one, other, 1 - GAIN_SHARE) for one, other in pairs])
    most = average([kept(one, other, 1 + GAIN_SHARE) for one, other in pairs])
    lag = average([kept(other, one, 1 - GAIN_SHARE) for one, other in pairs])
    outcome = equivalent(least, most) if tost else better(effect, lag)
    either = first_edge or second_edge
    return Finding(
        effect,
        e.metric,
        outcome,
        _margin(margin, "MLP-only's gain"),
        math.copysign(margin, effect.value) if tost else 0.0,
        sum(one.runs + two.runs for one, two in pairs),
        min(min(a.seeds, b.seeds) for a, b in pairs),
        reading,
        either if tost else second_edge,
        either if tost else first_edge,
    )


def by_batch(e: Evidence, stratum: Mask) -> dict[float, dict[int, Arm]]:
    """Arms by batch size and rank (0 full fine-tuning), each size at one length: full
    fine-tuning's, where it ran.
    """
    found = {}
    for size in np.unique(e.batch[stratum]):
        parts = list(e.strata(stratum & (e.batch == size), "budget"))
        if parts:
            part = next((part for part in parts if e.full_like(part).any()), parts[0])
            full = e.arm(e.full_like(part))
            found[float(size)] = ({0: full} if full is not None else {}) | e.arms(
                part, e.ranks(part)
            )
    return found


def _smallest_and_largest(
    sizes: dict[float, dict[int, Arm]],
) -> tuple[dict[int, Arm], dict[int, Arm], tuple[float, float]] | None:
    """Arms by rank at the smallest and the largest batch that LoRA and full fine-tuning both ran
    at.
    """
    both = {size: arms for size, arms in sizes.items() if 0 in arms and len(arms) > 1}
    if len(both) < 2:
        return None
    small, large = min(both), max(both)
    shared = [rank for rank in both[small] if rank in both[large]]
    if len(shared) < 2:
        return None
    return {r: both[small][r] for r in shared}, {r: both[large][r] for r in shared}, (small, large)


def _batch_costs(
    e: Evidence, small: dict[int, Arm], large: dict[int, Arm], sizes: tuple[float, float]
) -> Finding | Block:
    for rank in small:
        if block := not_learned(small[rank], _named(rank)):
            return block
    costs = {rank: gap(small[rank], large[rank]) for rank in small}
    known = {rank: cost for rank, cost in costs.items() if cost is not None}
    if len(known) < len(costs):
        return Block("an arm has fewer than two seeds at its good learning rates", "")
    margin = GAIN_SHARE * gained(small[0])
    effects = {rank: difference(cost, known[0]) for rank, cost in known.items() if rank}
    least = min(effects.values(), key=lambda found: found.value)
    outcome = every(
        [better(effect, effect.scaled(-1.0).shifted(margin)) for effect in effects.values()]
    )
    each = listed([f"{_named(rank)} {points(effect.value)}" for rank, effect in effects.items()])
    reading = (
        f"Going from {sizes[0]:g} to {sizes[1]:g} sequences an update cost full "
        f"fine-tuning {known[0].value:.3f}, and "
        f"beyond that {each}."
    )
    arms = [*small.items(), *large.items()]
    edges = [b for rank, arm in arms if (b := untuned(arm, _named(rank), coarse=False))]
    edge = edges[0] if edges else None
    return Finding(
        least,
        e.metric,
        outcome,
        _margin(margin, "full fine-tuning's gain"),
        0.0,
        sum(arm.runs for _, arm in arms),
        min(arm.seeds for _, arm in arms),
        reading,
        edge,
        edge,
    )


def _capacity(
    e: Evidence, arms: dict[int, Arm], sizes: dict[int, float], spare: list[int], taught: float
) -> Finding | Block:
    ordered = sorted(arms, key=lambda rank: sizes[rank])
    largest = arms[ordered[-1]]
    if block := not_learned(largest, f"rank {ordered[-1]}"):
        return block
    margin = GAIN_SHARE * gained(largest)
    effects = {rank: gap(arms[rank], largest) for rank in spare if rank != ordered[-1]}
    known = {rank: effect for rank, effect in effects.items() if effect is not None}
    if len(known) < len(effects):
        return Block("a rank has fewer than two seeds at its good learning rates", "")
    least = min(known, key=lambda rank: known[rank].value)
    reading = (
        f"{taught:.0f} episodes teach at most as many bits; every rank from {spare[0]} on "
        "holds them, and the lowest "
        f"against rank {ordered[-1]} is rank {least} at {points(known[least].value)}."
    )
    fails = next((b for rank in known if (b := untuned(arms[rank], f"rank {rank}"))), None)
    return Finding(
        known[least],
        e.metric,
        every([no_worse(kept(arms[rank], largest, 1 - GAIN_SHARE)) for rank in known]),
        _margin(margin, f"rank {ordered[-1]}'s gain"),
        -margin,
        sum(arms[rank].runs for rank in {*spare, ordered[-1]}),
        min(arm.seeds for arm in arms.values()),
        reading,
        untuned(largest, f"rank {ordered[-1]}"),
        fails,
    )


def _named(rank: int) -> str:
    return "full fine-tuning" if rank == 0 else f"rank {rank}"


def _margin(margin: float, of: str) -> str:
    return f"{margin:.3f} ({GAIN_SHARE:.0%} of {of})"
