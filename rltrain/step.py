"""THE training step, top to bottom."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from rltrain.batch import Batch
from rltrain.losses import Totals
from rltrain.model import token_logprobs, token_logprobs_and_entropy
from rltrain.pack import Member, Pack
from rltrain.probe import check_gap, prove_sync
from rltrain.rollout import Rollout, rollout
from rltrain.seeding import stream_seed

Row = dict[str, float]
GAP_MEAN = "sampling/sampling_logp_difference/mean"
GAP_MAX = "sampling/sampling_logp_difference/max"


def train_step(pack: Pack) -> dict[Member, Row]:
    """One GRPO step of every member: roll out, score, update, publish; each member's metrics."""
    rollouts_M = rollout(pack)
    with pack.engine_asleep():
        batches_M = [prepare(pack, scored) for scored in rollouts_M]
        updates = [update(pack, minibatch) for minibatch in minibatches(batches_M)]
    pack.publish()
    return collect_stats(pack, batches_M, updates)


@dataclass(slots=True)
class Prepared:
    """A member's batch with advantages and old (and reference) log-probabilities, and what was seen on the way."""

    member: Member
    batch: Batch
    stats: Row


@dataclass(slots=True)
class Update:
    """One optimizer step of one member."""

    member: Member
    stats: Row


@torch.no_grad()
def prepare(pack: Pack, scored: Rollout) -> Prepared:
    """Advantages, old and reference log-probabilities, and the proof that the engine sampled from this policy."""
    member = scored.member
    batch = scored.batch(pack)
    batch.advantages = member.advantages(scored.rewards).flatten().to(pack.device)
    pack.activate(member)
    with pack.timer.span("logprobs"):
        prove_sync(pack, member, batch, member.temperature)
        parts = list(batch.split(member.recipe.trainer.micro_forward_batch_size_per_gpu))
        if member.needs_old_logprobs:
            old = [token_logprobs(pack.model, part, member.temperature) for part in parts]
            batch.old_logprobs = widen(old, batch.mask.shape[1])
        if member.reference is not None:
            ref = [member.reference.logprobs(part, member.temperature) for part in parts]
            batch.ref_logprobs = widen(ref, batch.mask.shape[1])
    member.step_tokens = batch.tokens + int(batch.prompt_mask.sum())
    member.num_tokens += member.step_tokens
    return Prepared(member, batch, scored.statistics() | {"num_tokens": member.num_tokens})


def minibatches(batches_M: Iterable[Prepared]) -> Iterator[tuple[Member, int, Batch]]:
    """Each member's mini-batches in turn with their places, `update_epochs_per_batch` times over."""
    for prepared in batches_M:
        recipe = prepared.member.recipe
        size = recipe.trainer.policy_mini_batch_size * recipe.generator.n_samples_per_prompt
        epochs = range(recipe.trainer.update_epochs_per_batch)
        for place, part in enumerate(part for _ in epochs for part in prepared.batch.split(size)):
            yield prepared.member, place, part


def update(pack: Pack, minibatch: tuple[Member, int, Batch]) -> Update:
    """Forward, loss and backward over micro-batches, then one optimizer step; a non-finite gradient skips the step.

    Where old log-probabilities were not needed apart, the policy is still the one that sampled, and these are they.
    """
    member, place, batch = minibatch
    pack.activate(member)
    # Dropout draws from the process's generator: its masks are a named stream like any other.
    torch.manual_seed(stream_seed(member.recipe.seed, "dropout", member.step, place))
    totals = member.objective.totals(batch)
    stats: Row = defaultdict(float)
    with pack.timer.span("update"):
        pack.model.train()
        for micro in batch.split(member.recipe.trainer.micro_train_batch_size_per_gpu):
            logprobs, entropy = token_logprobs_and_entropy(pack.model, micro, member.temperature)
            if micro.old_logprobs is None:
                micro.old_logprobs = logprobs.detach()
            loss, seen = member.objective(logprobs, micro, totals)
            loss.backward()
            add_up(stats, seen | sampling_stats(micro, entropy, totals))
        pack.model.eval()
        check_gap(stats[GAP_MEAN], stats[GAP_MAX], member.sync_tolerance)
        stats |= {"learning_rate": float(member.optimizer.param_groups[0]["lr"]), **optimizer_step(member)}
    return Update(member, dict(stats))


def optimizer_step(member: Member) -> Row:
    """Clip, step and zero; raises FloatingPointError after `trainer.max_bad_steps` non-finite gradients in a row."""
    limit = member.recipe.trainer.policy.optimizer_config.max_grad_norm
    norm = float(torch.nn.utils.clip_grad_norm_(member.parameters.values(), limit))
    finite = math.isfinite(norm)
    member.bad_steps = 0 if finite else member.bad_steps + 1
    if finite:
        member.optimizer.step()
    member.optimizer.zero_grad()
    if member.bad_steps >= member.recipe.trainer.max_bad_steps:
        raise FloatingPointError(
            f"the gradient was not finite {member.bad_steps} times in a row (last norm {norm}): "
            "the learning rate is probably too high"
        )
    return {"grad_norm": norm, "skipped_updates": float(not finite)}


def sampling_stats(micro: Batch, entropy_BT: torch.Tensor, totals: Totals) -> Row:
    """A micro-batch's share of the mean entropy and of the gap between engine and trainer; the gap's maximum whole."""
    assert micro.old_logprobs is not None
    gap = (micro.engine_logprobs - micro.old_logprobs).abs() * micro.mask
    return {
        "entropy": float((entropy_BT * micro.mask).sum()) / totals.tokens,
        GAP_MEAN: float(gap.sum()) / totals.tokens,
        GAP_MAX: float(gap.max()),
    }


def add_up(stats: Row, seen: Row) -> None:
    """Add a micro-batch's shares to the mini-batch's statistics; maxima stay maxima."""
    for name, value in seen.items():
        stats[name] = max(stats[name], value) if name == GAP_MAX else stats[name] + value


def widen(parts: list[torch.Tensor], width: int) -> torch.Tensor:
    """Stack `[b, t]` parts into `[B, T]`, zeros where a part was narrower."""
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def collect_stats(pack: Pack, batches_M: list[Prepared], updates: list[Update]) -> dict[Member, Row]:
    """Each member's metrics of the step; what several updates saw is averaged, skipped updates are summed."""
    timings = pack.timer.take()
    rows = {}
    for prepared in batches_M:
        own = [u.stats for u in updates if u.member is prepared.member]
        means = {name: sum(s[name] for s in own) / len(own) for name in own[0]}
        means["skipped_updates"] = sum(s["skipped_updates"] for s in own)
        means[GAP_MAX] = max(s[GAP_MAX] for s in own)
        rows[prepared.member] = {**prepared.stats, **means, **timings}
    return rows
