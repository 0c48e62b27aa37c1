"""Evaluation on held-out problems, sampled with the adapter as the engine serves it."""

from __future__ import annotations

import torch

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
    samples = []
    with pack.timer.span("eval"):
        for start in range(0, len(requests), size):
            samples += pack.engine.generate(requests[start : start + size])
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


def _metrics(rewards_PG: torch.Tensor, n: int) -> dict[str, float]:
    """Accuracy (mean reward) and, with several samples a problem, mean@N and pass@N (reward of at least 1)."""
    mean = float(rewards_PG.mean())
    if n == 1:
        return {"eval/accuracy": mean}
    passed = float((rewards_PG >= 1).any(dim=1).float().mean())
    return {"eval/accuracy": mean, f"eval/mean@{n}": mean, f"eval/pass@{n}": passed}
