"""Evaluation on held-out problems, sampled with the adapter as the engine serves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rltrain.engines.base import Request, Sample
from rltrain.member import Member, truncates
from rltrain.pack import Pack
from rltrain.rollout import request, score
from rltrain.scored import Rollout


def evaluate(pack: Pack, member: Member) -> tuple[dict[str, float], Rollout]:
    """Metrics and scored samples of the member's held-out problems.

    Sampling seeds depend on the run's seed and the problem alone, so that evaluations differ by the policy only.
    """
    generator = member.recipe.generator
    n, sampling = generator.eval_n_samples_per_prompt, generator.eval_sampling_params
    size = max(1, member.recipe.trainer.eval_batch_size // n)
    requests = [
        request(pack, member, problem, sampling, n, "eval", place) for place, problem in enumerate(member.held_out)
    ]
    with pack.timer.span("eval"):
        samples = _samples(pack, member, requests, size)
        scored = score(pack, member, member.held_out, samples)
        # The last sync is followed by no training rollout: its proof is here, where the samples can be one.
        if sampling.temperature > 0 and not truncates(sampling):
            member.policy.prove(scored.batch(pack.stop_token_ids[0], pack.device), sampling.temperature)
    return _metrics(scored.rewards, n) | {
        "eval/num_problems": len(member.held_out),
        "eval/mean_length": scored.mean_length,
        "eval/clipped_ratio": scored.clipped_ratio,
        **pack.timer.take(),
    }, scored


def _samples(pack: Pack, member: Member, requests: Sequence[Request], size: int) -> list[list[Sample]]:
    """What the member answers, `size` requests a call; an untrained member answers what the one before it did.

    With B = 0 an adapter of any rank adds exact zeros: every trial of a sweep would sample the base anew, bit for bit.
    """
    untrained = all(not parameter.any() for name, parameter in member.policy.parameters.items() if "lora_B" in name)
    if not untrained or member.recipe.trainer.policy.model.lora.rank == 0:
        return _generated(pack, requests, size)
    key = repr((size, [(list(one.prompt_token_ids), one.n, one.seed, one.sampling) for one in requests]))
    if key not in pack.base_samples:
        pack.base_samples[key] = _generated(pack, requests, size)
    return pack.base_samples[key]


def _generated(pack: Pack, requests: Sequence[Request], size: int) -> list[list[Sample]]:
    calls = [requests[start : start + size] for start in range(0, len(requests), size)]
    return [group for call in calls for group in pack.engine.generate(call)]


def _metrics(rewards_PG: torch.Tensor, n: int) -> dict[str, float]:
    """Accuracy (mean reward) and, with several samples a problem, mean@N and pass@N (reward of at least 1)."""
    mean = float(rewards_PG.mean())
    if n == 1:
        return {"eval/accuracy": mean}
    passed = float((rewards_PG >= 1).any(dim=1).float().mean())
    return {"eval/accuracy": mean, f"eval/mean@{n}": mean, f"eval/pass@{n}": passed}
