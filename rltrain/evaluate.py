"""Evaluation on held-out problems, sampled from the adapters that the engine serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from harness.config.metrics import ACCURACY
from rltrain.engines.base import Request, Sample
from rltrain.member import Member, truncates
from rltrain.micro_batch_size import in_micro_batches
from rltrain.pack import Pack
from rltrain.rollout import Rollout, request, score

Evaluation = tuple[dict[str, float], Rollout]


def evaluate(pack: Pack, members: Sequence[Member]) -> dict[Member, Evaluation]:
    """Evaluate these members on their held-out problems, in one engine call if recipes allow it.

    Sampling seeds depend on a run's seed and the problem alone, so that evaluations of a run
    differ by its policy only.

    Returns:
        Metrics and scored samples of each member that did not fail.
    """
    with pack.span("eval"):
        samples = _sample(pack, members)
        rollouts = {m: pack.isolate(m, _score, pack, m, samples[m]) for m in members}
    seconds = pack.take_seconds()
    return {m: (_metrics(r) | seconds, r) for m, r in rollouts.items() if r is not None}


def _score(pack: Pack, member: Member, samples: list[list[Sample]]) -> Rollout:
    rollout = score(pack, member, member.held_out, samples)
    # No training rollout follows the last sync. Its check is here, if samples allow one.
    sampling = member.recipe.generator.eval_sampling_params
    if sampling.temperature > 0 and not truncates(sampling):
        batch = rollout.to_batch(pack.pad_id)
        compute = partial(in_micro_batches, pack, member)
        member.policy.check_engine(batch, sampling.temperature, compute)
    return rollout


def _sample(pack: Pack, members: Sequence[Member]) -> dict[Member, list[list[Sample]]]:
    """Sample the members' held-out problems.

    Untrained members that ask the same share their samples: with B = 0 every adapter adds zeros.
    """
    requests = {member: _requests(pack, member) for member in members}
    keys = {}
    for member in members:
        asked = [(list(r.prompt_token_ids), r.n, r.seed, r.sampling) for r in requests[member]]
        shared = repr((member.recipe.trainer.eval_batch_size, asked))
        keys[member] = shared if _untrained(member) else member.name
    missing = {keys[m]: requests[m] for m in members if keys[m] not in pack.base_samples}
    bounds = [member.recipe.trainer.eval_batch_size for member in members]
    bound = min((bound for bound in bounds if bound is not None), default=None)
    samples = _generate(pack, missing, bound)
    for member in members:
        key = keys[member]
        if key in samples and key != member.name:
            pack.base_samples[key] = samples[key]
    return {member: (samples | pack.base_samples)[keys[member]] for member in members}


def _requests(pack: Pack, member: Member) -> list[Request]:
    generator = member.recipe.generator
    n, sampling = generator.eval_n_samples_per_prompt, generator.eval_sampling_params
    return [
        request(pack, member, problem, sampling, n, "eval", index)
        for index, problem in enumerate(member.held_out)
    ]


def _untrained(member: Member) -> bool:
    if member.step > 0 or member.recipe.trainer.policy.model.lora.rank == 0:
        return False
    parameters = member.policy.parameters.items()
    return all(not parameter.any() for name, parameter in parameters if "lora_B" in name)


def _generate(
    pack: Pack, requests: Mapping[str, Sequence[Request]], bound: int | None
) -> dict[str, list[list[Sample]]]:
    """Return samples `[P][G]` for each key's requests, in calls of at most `bound` samples."""
    calls: list[list[Request]] = []
    size = 0
    for item in (item for group in requests.values() for item in group):
        if not calls or (bound is not None and size + item.n > bound):
            calls.append([])
            size = 0
        calls[-1].append(item)
        size += item.n
    groups = iter([group for call in calls for group in pack.engine.generate(call)])
    return {key: [next(groups) for _ in group] for key, group in requests.items()}


def _metrics(rollout: Rollout) -> dict[str, float]:
    mean_length, truncated = rollout.length_statistics()
    return _accuracy(rollout.rewards) | {
        "eval/num_problems": len(rollout.problems),
        "eval/mean_length": mean_length,
        "eval/clipped_ratio": truncated,
    }


def _accuracy(rewards_PG: torch.Tensor) -> dict[str, float]:
    """Return the mean reward and, with N samples per problem, mean@N and pass@N (reward >= 1)."""
    mean, n = float(rewards_PG.mean()), rewards_PG.shape[1]
    if n == 1:
        return {ACCURACY: mean}
    passed = float((rewards_PG >= 1).any(dim=1).float().mean())
    return {ACCURACY: mean, f"eval/mean@{n}": mean, f"eval/pass@{n}": passed}
