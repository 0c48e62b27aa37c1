"""Evaluation on held-out problems, sampled with the adapters as the engine serves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from rltrain.engines.base import Request, Sample
from rltrain.member import Member, truncates
from rltrain.pack import Pack
from rltrain.rollout import request, score
from rltrain.scored import Rollout
from rltrain.step import over_rows

Evaluated = tuple[dict[str, float], Rollout]


def evaluate(pack: Pack, members: Sequence[Member]) -> dict[Member, Evaluated]:
    """Metrics and scored samples of these members' held-out problems; one engine call for all, if
    their recipes let it.

    Sampling seeds depend on a run's seed and the problem alone, so that evaluations differ by the
    policy only. A member that fails here is missing, and noted in the pack's failures.
    """
    with pack.timer.span("eval"):
        answers = _samples(pack, members)
        scored = {
            member: pack.attempt(member, _score, member, answers[member]) for member in members
        }
    spent = pack.timer.take()
    return {
        member: (_metrics(one) | spent, one) for member, one in scored.items() if one is not None
    }


def _score(pack: Pack, member: Member, samples: list[list[Sample]]) -> Rollout:
    scored = score(pack, member, member.held_out, samples)
    # The last sync is followed by no training rollout: its proof is here, where the samples can be
    # one.
    sampling = member.recipe.generator.eval_sampling_params
    if sampling.temperature > 0 and not truncates(sampling):
        batch = scored.batch(pack.stop_token_ids[0])
        member.policy.prove(batch, sampling.temperature, partial(over_rows, pack, member))
    return scored


def _samples(pack: Pack, members: Sequence[Member]) -> dict[Member, list[list[Sample]]]:
    """Sample the members' held-out problems; untrained members that ask the same share one set of
    samples.

    With B = 0 an adapter of any rank adds exact zeros: every trial of a sweep would sample the base
    anew, bit for bit.
    """
    asked = {member: _requests(pack, member) for member in members}
    keys = {
        member: _key(member, asked[member]) if _untrained(member) else member.name
        for member in members
    }
    wanted = {
        keys[member]: asked[member] for member in members if keys[member] not in pack.base_samples
    }
    bounds = [member.recipe.trainer.eval_batch_size for member in members]
    answers = _generated(
        pack, wanted, min((bound for bound in bounds if bound is not None), default=None)
    )
    pack.base_samples |= {
        keys[m]: answers[keys[m]] for m in members if keys[m] in answers and keys[m] != m.name
    }
    return {member: (answers | pack.base_samples)[keys[member]] for member in members}


def _requests(pack: Pack, member: Member) -> list[Request]:
    generator = member.recipe.generator
    n, sampling = generator.eval_n_samples_per_prompt, generator.eval_sampling_params
    return [
        request(pack, member, problem, sampling, n, "eval", place)
        for place, problem in enumerate(member.held_out)
    ]


def _untrained(member: Member) -> bool:
    if member.step > 0 or member.recipe.trainer.policy.model.lora.rank == 0:
        return False
    return all(
        not parameter.any()
        for name, parameter in member.policy.parameters.items()
        if "lora_B" in name
    )


def _key(member: Member, requests: Sequence[Request]) -> str:
    """All that an untrained member's samples depend on."""
    asked = [(list(one.prompt_token_ids), one.n, one.seed, one.sampling) for one in requests]
    return repr((member.recipe.trainer.eval_batch_size, asked))


def _generated(
    pack: Pack, wanted: Mapping[str, Sequence[Request]], bound: int | None
) -> dict[str, list[list[Sample]]]:
    """Answers `[P][G]` to each one's requests, in calls of at most `bound` samples."""
    calls: list[list[Request]] = []
    for one in (one for requests in wanted.values() for one in requests):
        if not calls or (bound is not None and sum(other.n for other in calls[-1]) + one.n > bound):
            calls.append([])
        calls[-1].append(one)
    groups = iter([group for call in calls for group in pack.engine.generate(call)])
    return {key: [next(groups) for _ in requests] for key, requests in wanted.items()}


def _metrics(scored: Rollout) -> dict[str, float]:
    return _accuracy(scored.rewards) | {
        "eval/num_problems": len(scored.problems),
        "eval/mean_length": scored.mean_length,
        "eval/clipped_ratio": scored.clipped_ratio,
    }


def _accuracy(rewards_PG: torch.Tensor) -> dict[str, float]:
    """Accuracy (mean reward) and, with several samples a problem, mean@N and pass@N (reward of at
    least 1).
    """
    mean, n = float(rewards_PG.mean()), rewards_PG.shape[1]
    if n == 1:
        return {"eval/accuracy": mean}
    passed = float((rewards_PG >= 1).any(dim=1).float().mean())
    return {"eval/accuracy": mean, f"eval/mean@{n}": mean, f"eval/pass@{n}": passed}
