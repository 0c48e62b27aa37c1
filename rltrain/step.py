"""THE training step, top to bottom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rltrain.batch import Batch, micro_batches, shares, training_parts
from rltrain.learner import Learner, Row
from rltrain.member import Member
from rltrain.objective import RATIO_MAX
from rltrain.pack import Pack
from rltrain.policy import GAP_MAX
from rltrain.rollout import rollout
from rltrain.scored import Rollout
from rltrain.seeding import stream_seed

T = TypeVar("T")

MAXIMA = (GAP_MAX, RATIO_MAX)


def train_step(pack: Pack, members: Sequence[Member]) -> dict[Member, Row]:
    """One step of these members: roll out, score, update, publish; the metrics of each that did not fail."""
    rollouts_M = rollout(pack, members)
    with pack.engine_asleep():
        batches_M = present(pack.attempt(scored.member, prepare, scored, stats) for scored, stats in rollouts_M)
        updates = present(pack.attempt(mini.member, update, mini) for mini in minibatches(batches_M))
    pack.publish(members)
    return collect_stats(pack, batches_M, updates)


def present(results: Iterable[T | None]) -> list[T]:
    """What there is of attempts, some of which may have failed."""
    return [result for result in results if result is not None]


@dataclass(slots=True)
class Prepared:
    """A member's batch with everything its updates need, and what was seen on the way."""

    member: Member
    batch: Batch
    group: int
    stats: Row


@dataclass(slots=True)
class MiniBatch:
    """What one optimizer step of one learner sees; `place` counts a step's mini-batches."""

    member: Member
    learner: Learner
    place: int
    batch: Batch


@dataclass(slots=True)
class Update:
    """One optimizer step of one learner."""

    member: Member
    learner: Learner
    stats: Row


@torch.no_grad()
def prepare(pack: Pack, scored: Rollout, stats: Row) -> Prepared:
    """Old and reference log-probabilities, values, advantages, and the proof that the engine sampled this policy."""
    member = scored.member
    batch = scored.batch(pack.stop_token_ids[0], pack.device)
    with pack.timer.span("logprobs"):
        member.policy.activate()
        if member.needs_old_logprobs:
            batch.old_logprobs = over_rows(pack, member, batch, member.policy.logprobs)
            member.policy.prove(batch, member.policy.temperature)
        if member.policy.reference is not None:
            batch.ref_logprobs = over_rows(pack, member, batch, member.policy.reference_logprobs)
        if member.critic is not None:
            member.critic.activate()
            batch.values = over_rows(pack, member, batch, member.critic.values)
    stats |= member.credit(batch, scored.rewards, scored.cut)
    member.step_tokens = int(batch.mask.sum() + batch.prompt_mask.sum())
    member.num_tokens += member.step_tokens
    return Prepared(member, batch, scored.rewards.shape[1], stats | {"num_tokens": member.num_tokens})


def over_rows(pack: Pack, member: Member, batch: Batch, compute: Callable[[Batch], torch.Tensor]) -> torch.Tensor:
    """`compute` over a batch in micro-batches, `[B, T]`, zeros where there is no token; the ranks share the rows."""
    trainer, ranks = member.recipe.trainer, pack.ranks
    size, budget = trainer.micro_forward_batch_size_per_gpu, trainer.max_tokens_per_microbatch
    plans = [micro_batches(batch, own, size, budget) for own in shares(range(len(batch)), ranks.size)]
    out = torch.zeros_like(batch.mask)
    for place in range(max(map(len, plans))):
        # A sharded model computes on all ranks at once: one that has no rows left computes some without keeping them.
        own = plans[ranks.rank][place] if place < len(plans[ranks.rank]) else []
        values = compute(batch.take(own or [0]))
        if own:
            out[own, : values.shape[1]] = values
    return ranks.sum_rows(out * batch.mask)


def minibatches(batches_M: Iterable[Prepared]) -> Iterator[MiniBatch]:
    """Each member's mini-batches for each of its learners in turn, `update_epochs_per_batch` times over."""
    for prepared in batches_M:
        member, batch = prepared.member, prepared.batch
        for learner in member.learners:
            size = learner.mini_batch_size * prepared.group
            starts = list(range(0, len(batch), size)) * member.recipe.trainer.update_epochs_per_batch
            for place, start in enumerate(starts):
                yield MiniBatch(member, learner, place, batch.take(range(start, min(start + size, len(batch)))))


def update(pack: Pack, mini: MiniBatch) -> Update:
    """Forward, loss and backward over micro-batches, then one optimizer step; none where nothing is to be learned."""
    learner, ranks, recipe = mini.learner, pack.ranks, mini.member.recipe
    learner.activate()
    # Dropout draws from the process's generator: its masks are a named stream like any other.
    torch.manual_seed(stream_seed(recipe.seed, "dropout", learner.name, mini.member.step, mini.place, ranks.rank))
    totals = learner.totals(mini.batch)
    stats: Row = defaultdict(float)
    with pack.timer.span("update" if learner is mini.member.policy else learner.name):
        learner.model.train()
        for micro, moves in training_parts(mini.batch, recipe.trainer, learner.moves(mini.batch), ranks):
            with torch.set_grad_enabled(moves):
                loss, seen = learner.loss(micro, totals)
            if moves:
                loss.backward()
            add_up(stats, seen)
        learner.model.eval()
        summed = ranks.add_up(stats, MAXIMA)
        if summed:
            learner.check(summed, mini.batch)
            summed |= learner.optimize(ranks)
    return Update(mini.member, learner, summed)


def add_up(stats: Row, seen: Row) -> None:
    """Add a micro-batch's shares to the mini-batch's statistics; maxima stay maxima."""
    for name, value in seen.items():
        stats[name] = max(stats[name], value) if name in MAXIMA else stats[name] + value


def collect_stats(pack: Pack, batches_M: list[Prepared], updates: list[Update]) -> dict[Member, Row]:
    """Each member's metrics of the step; what several updates saw is averaged, skipped updates are summed."""
    shared = pack.timer.take() | {"perf/members": float(len(batches_M))}
    rows = {}
    for prepared in (one for one in batches_M if one.member not in pack.failures):
        row = dict(prepared.stats)
        for learner in prepared.member.learners:
            own = [u.stats for u in updates if u.learner is learner and u.stats]
            for name in own[0] if own else {}:
                values = [stats[name] for stats in own]
                if name in MAXIMA:
                    row[learner.prefix + name] = max(values)
                elif name == "skipped_updates":
                    row[name] = row.get(name, 0.0) + sum(values)
                else:
                    row[learner.prefix + name] = sum(values) / len(values)
        rows[prepared.member] = {**row, **shared}
    return rows
