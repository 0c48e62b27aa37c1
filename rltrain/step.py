"""The training step, top to bottom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from rltrain.algorithms.advantages import compute_advantages
from rltrain.algorithms.trained_model import MAXIMA, Row, Statistics, TrainedModel
from rltrain.data.batch import Batch
from rltrain.data.micro_batches import training_parts
from rltrain.data.seeding import stream_seed
from rltrain.member import Member
from rltrain.micro_batch_size import checked, in_micro_batches, with_smaller_passes
from rltrain.pack import Pack
from rltrain.rollout import Rollout, sample_rollouts


def train_step(pack: Pack, members: Sequence[Member]) -> dict[Member, Row]:
    """Take one training step of these members: sample together, then train one after the other.

    Returns:
        The metrics of each member that did not fail; `pack.failures` has the others' errors.
    """
    rollouts = sample_rollouts(pack, members)
    rows = {}
    with pack.engine_asleep():
        for member, (rollout, metrics) in rollouts.items():
            row = pack.isolate(member, train_member, pack, rollout)
            if row is not None:
                rows[member] = metrics | row
    pack.publish(members)
    shared = pack.take_seconds() | {"perf/members": float(len(rollouts))}
    return {m: row | shared for m, row in rows.items() if m not in pack.failures}


def train_member(pack: Pack, rollout: Rollout) -> Row:
    """Train one member on its rollout; return its metrics.

    Raises SyncError where the engine did not sample from this member's adapter.
    """
    member = rollout.member
    batch = rollout.to_batch(pack.pad_id)
    with pack.span("logprobs"):
        member.policy.activate()
        if member.needs_old_logprobs:
            batch.old_logprobs = in_micro_batches(pack, member, batch, member.policy.logprobs)
            member.policy.check_engine(
                batch, member.policy.temperature, partial(in_micro_batches, pack, member)
            )
        if member.policy.reference is not None:
            reference = member.policy.reference_logprobs
            batch.ref_logprobs = in_micro_batches(pack, member, batch, reference)
        if member.critic is not None:
            member.critic.activate()
            batch.values = in_micro_batches(pack, member, batch, member.critic.values)
    row = compute_advantages(member.recipe, batch, rollout.rewards, rollout.truncated)
    member.step_tokens = int(batch.mask.sum() + batch.prompt_mask.sum())
    member.num_tokens += member.step_tokens
    row["num_tokens"] = member.num_tokens
    for model in member.trained_models:
        size = model.mini_batch_size * rollout.rewards.shape[1]
        epochs = member.recipe.trainer.update_epochs_per_batch
        updates = [
            update(pack, member, model, mini, index)
            for index, mini in enumerate(mini_batches(batch, size, epochs))
        ]
        row |= combine_updates(model, updates, row)
    return row


def mini_batches(batch: Batch, size: int, epochs: int) -> Iterator[Batch]:
    """Yield the mini-batches of `size` sequences, `epochs` times over."""
    for start in list(range(0, len(batch), size)) * epochs:
        yield batch.take(range(start, min(start + size, len(batch))))


def update(pack: Pack, member: Member, model: TrainedModel, mini: Batch, index: int) -> Row:
    """Take one optimizer step on a mini-batch; return its statistics.

    `index` counts the step's mini-batches. Where no token trains, on any rank, nothing happens and
    there are no statistics.
    """
    model.activate()
    with pack.span(model.span):
        stats = with_smaller_passes(
            member, pack.ranks, lambda: accumulate_gradients(pack, member, model, mini, index)
        )
        stats = pack.ranks.add_up(stats, MAXIMA)
        if stats:
            if model is member.policy:
                member.policy.check_statistics(stats, mini, partial(in_micro_batches, pack, member))
            stats |= model.optimize(pack.ranks)
    return stats


def accumulate_gradients(
    pack: Pack, member: Member, model: TrainedModel, mini: Batch, index: int
) -> Row:
    """Forward, loss and backward over a mini-batch's micro-batches; return this rank's statistics.

    May be called again for the same mini-batch: it starts from zero gradients.
    """
    model.optimizer.zero_grad()
    # Dropout draws from the process's generator: seeded here, its masks do not depend on others.
    stream = ("dropout", model.name, member.step, index, pack.ranks.rank)
    torch.manual_seed(stream_seed(member.recipe.seed, *stream))
    totals, size = model.totals(mini), member.recipe.trainer.micro_train_batch_size_per_gpu
    parts = training_parts(mini, size, member.max_tokens, model.needs_grad(mini), pack.ranks)
    stats: Statistics = {}
    model.model.train()
    with checked([micro for micro, _ in parts]):
        for micro, needs_grad in parts:
            with torch.set_grad_enabled(needs_grad):
                loss, micro_stats = model.loss(micro, totals)
            if needs_grad:
                loss.backward()
            add_statistics(stats, micro_stats)
        # All at once and only here: reading a number waits for the GPU.
        values = torch.stack(list(stats.values())).tolist() if stats else []
    model.model.eval()
    return dict(zip(stats, values, strict=True))


def add_statistics(stats: Statistics, micro_stats: Statistics) -> None:
    """Add a micro-batch's share to the mini-batch's statistics; maxima stay maxima."""
    for name, value in micro_stats.items():
        value = value.double()
        if name in stats:
            is_maximum = name in MAXIMA
            value = torch.maximum(stats[name], value) if is_maximum else stats[name] + value
        stats[name] = value


def combine_updates(model: TrainedModel, updates: list[Row], row: Row) -> Row:
    """Return a model's metrics of the step: maxima, sums of skipped updates, means of the rest."""
    updates = [stats for stats in updates if stats]
    combined = {}
    for name in updates[0] if updates else {}:
        values = [stats[name] for stats in updates]
        if name in MAXIMA:
            combined[model.prefix + name] = max(values)
        elif name == "skipped_updates":
            combined[name] = row.get(name, 0.0) + sum(values)
        else:
            combined[model.prefix + name] = sum(values) / len(values)
    return combined
