"""THE training step, top to bottom."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from rltrain.batch import Batch
from rltrain.model import token_logprobs
from rltrain.pack import Member, Pack
from rltrain.probe import prove_sync
from rltrain.rollout import Rollout, rollout

Row = dict[str, float]


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
        batch.old_logprobs, entropy = forward_logprobs(pack, member, batch)
        if member.reference is not None:
            parts = batch.split(member.recipe.trainer.micro_forward_batch_size_per_gpu)
            ref = [member.reference.logprobs(part, member.temperature) for part in parts]
            batch.ref_logprobs = widen(ref, batch.mask.shape[1])
        gap = prove_sync(pack, member, batch, member.temperature)
    member.num_tokens += batch.tokens + int(batch.prompt_mask.sum())
    stats = scored.statistics() | {
        "entropy": float((entropy * batch.mask).sum()) / max(1, batch.tokens),
        "num_tokens": member.num_tokens,
        "sampling/sampling_logp_difference/mean": gap.engine,
        "sampling/sampling_logp_difference/max": gap.largest,
    }
    return Prepared(member, batch, stats)


def minibatches(batches_M: Iterable[Prepared]) -> Iterator[tuple[Member, Batch]]:
    """Each member's mini-batches in turn, `update_epochs_per_batch` times over."""
    for prepared in batches_M:
        recipe = prepared.member.recipe
        size = recipe.trainer.policy_mini_batch_size * recipe.generator.n_samples_per_prompt
        for _ in range(recipe.trainer.update_epochs_per_batch):
            for part in prepared.batch.split(size):
                yield prepared.member, part


def update(pack: Pack, minibatch: tuple[Member, Batch]) -> Update:
    """Forward, loss and backward over micro-batches, then one optimizer step; a non-finite gradient skips the step."""
    member, batch = minibatch
    pack.activate(member)
    totals = member.objective.totals(batch)
    stats: Row = defaultdict(float)
    with pack.timer.span("update"):
        pack.model.train()
        for micro in batch.split(member.recipe.trainer.micro_train_batch_size_per_gpu):
            logprobs, _ = token_logprobs(pack.model, micro, member.temperature)
            loss, seen = member.objective(logprobs, micro, totals)
            loss.backward()
            for name, value in seen.items():
                stats[name] += value
        pack.model.eval()
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


def forward_logprobs(pack: Pack, member: Member, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's log-probabilities and entropies of a whole batch, micro-batch by micro-batch; `[B, T]` each."""
    logprobs, entropies = [], []
    for micro in batch.split(member.recipe.trainer.micro_forward_batch_size_per_gpu):
        values, entropy = token_logprobs(pack.model, micro, member.temperature, entropy=True)
        assert entropy is not None
        logprobs.append(values)
        entropies.append(entropy)
    width = batch.mask.shape[1]
    return widen(logprobs, width), widen(entropies, width)


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
        rows[prepared.member] = {**prepared.stats, **means, **timings}
    return rows
