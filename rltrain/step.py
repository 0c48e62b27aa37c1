"""THE training step, top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from rltrain.algorithms.learner import Learner, Row, Statistics
from rltrain.algorithms.objective import RATIO_MAX
from rltrain.algorithms.policy import GAP_MAX
from rltrain.data.batch import Batch
from rltrain.data.micro_batches import micro_batches, shares, training_parts
from rltrain.data.seeding import stream_seed
from rltrain.member import Member
from rltrain.out_of_memory import checked, with_smaller_passes
from rltrain.pack import Pack
from rltrain.rollout import rollout
from rltrain.scored import Rollout

T = TypeVar("T")

MAXIMA = (GAP_MAX, RATIO_MAX)


def train_step(pack: Pack, members: Sequence[Member]) -> dict[Member, Row]:
    """One step of these members: roll out, score, update, publish; the metrics of each that did not
    fail.
    """
    rollouts_M = rollout(pack, members)
    with pack.engine_asleep():
        batches_M = present(
            pack.attempt(scored.member, prepare, scored, stats) for scored, stats in rollouts_M
        )
        updates = present(
            pack.attempt(mini.member, update, mini) for mini in minibatches(batches_M)
        )
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
    """Old and reference log-probabilities, values, advantages, and the proof that the engine
    sampled this policy.
    """
    member = scored.member
    batch = scored.batch(pack.stop_token_ids[0])
    with pack.timer.span("logprobs"):
        member.policy.activate()
        if member.needs_old_logprobs:
            batch.old_logprobs = over_rows(pack, member, batch, member.policy.logprobs)
            member.policy.prove(batch, member.policy.temperature, partial(over_rows, pack, member))
        if member.policy.reference is not None:
            batch.ref_logprobs = over_rows(pack, member, batch, member.policy.reference_logprobs)
        if member.critic is not None:
            member.critic.activate()
            batch.values = over_rows(pack, member, batch, member.critic.values)
    stats |= member.credit(batch, scored.rewards, scored.cut)
    member.step_tokens = int(batch.mask.sum() + batch.prompt_mask.sum())
    member.num_tokens += member.step_tokens
    return Prepared(
        member, batch, scored.rewards.shape[1], stats | {"num_tokens": member.num_tokens}
    )


@torch.no_grad()
def over_rows(
    pack: Pack, member: Member, batch: Batch, compute: Callable[[Batch], torch.Tensor]
) -> torch.Tensor:
    """`compute` over a batch in micro-batches, `[B, T]`, zeros where there is no token; the ranks
    share the rows.
    """
    ranks, size = pack.ranks, member.recipe.trainer.micro_forward_batch_size_per_gpu

    def attempt() -> torch.Tensor:
        plans = [
            micro_batches(batch, own, size, member.max_tokens)
            for own in shares(range(len(batch)), ranks.size)
        ]
        # A sharded model computes on all ranks at once: one that has no rows left computes some
        # without keeping them.
        own = plans[ranks.rank] + [[]] * (max(map(len, plans)) - len(plans[ranks.rank]))
        passes = [batch.take(rows or [0]) for rows in own]
        with checked(passes):
            values = [compute(one) for one in passes]
        out = torch.zeros_like(batch.mask)
        for rows, found in zip(own, values, strict=True):
            if rows:
                out[rows, : found.shape[1]] = found.cpu()
        return ranks.sum_rows(out * batch.mask)

    return with_smaller_passes(member, ranks, attempt)


def minibatches(batches_M: Iterable[Prepared]) -> Iterator[MiniBatch]:
    """Each member's mini-batches for each of its learners in turn, `update_epochs_per_batch` times
    over.
    """
    for prepared in batches_M:
        member, batch = prepared.member, prepared.batch
        for learner in member.learners:
            size = learner.mini_batch_size * prepared.group
            starts = (
                list(range(0, len(batch), size)) * member.recipe.trainer.update_epochs_per_batch
            )
            for place, start in enumerate(starts):
                yield MiniBatch(
                    member, learner, place, batch.take(range(start, min(start + size, len(batch))))
                )


def update(pack: Pack, mini: MiniBatch) -> Update:
    """Forward, loss and backward over micro-batches, then one optimizer step; none where nothing is
    to be learned.
    """
    learner, member, ranks = mini.learner, mini.member, pack.ranks
    learner.activate()
    with pack.timer.span("update" if learner is member.policy else learner.name):
        stats = with_smaller_passes(member, ranks, lambda: accumulate_gradients(pack, mini))
        summed = ranks.add_up(stats, MAXIMA)
        if summed:
            if learner is member.policy:
                member.policy.check(summed, mini.batch, partial(over_rows, pack, member))
            summed |= learner.optimize(ranks)
    return Update(member, learner, summed)


def accumulate_gradients(pack: Pack, mini: MiniBatch) -> Row:
    """Forward, loss and backward over a mini-batch's micro-batches, from its start; this rank's
    statistics.
    """
    learner, member, ranks = mini.learner, mini.member, pack.ranks
    learner.optimizer.zero_grad()
    # Dropout draws from the process's generator: its masks are a named stream like any other.
    torch.manual_seed(
        stream_seed(
            member.recipe.seed, "dropout", learner.name, member.step, mini.place, ranks.rank
        )
    )
    totals, size = learner.totals(mini.batch), member.recipe.trainer.micro_train_batch_size_per_gpu
    parts = training_parts(mini.batch, size, member.max_tokens, learner.moves(mini.batch), ranks)
    stats: Statistics = {}
    learner.model.train()
    with checked([micro for micro, _ in parts]):
        for micro, moves in parts:
            with torch.set_grad_enabled(moves):
                loss, seen = learner.loss(micro, totals)
            if moves:
                loss.backward()
            add_up(stats, seen)
        # All at once, and only now: to read a number is to wait for the GPU.
        values = torch.stack(list(stats.values())).tolist() if stats else []
    learner.model.eval()
    return dict(zip(stats, values, strict=True))


def add_up(stats: Statistics, seen: Statistics) -> None:
    """Add a micro-batch's shares to the mini-batch's statistics; maxima stay maxima."""
    for name, value in seen.items():
        value = value.double()
        if name in stats:
            value = torch.maximum(stats[name], value) if name in MAXIMA else stats[name] + value
        stats[name] = value


def collect_stats(
    pack: Pack, batches_M: list[Prepared], updates: list[Update]
) -> dict[Member, Row]:
    """Each member's metrics of the step; what several updates saw is averaged, skipped updates are
    summed.
    """
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
