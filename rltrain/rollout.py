"""Prompts to samples to rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.config.schema import Sampling
from rltrain.algorithms.dynamic_sampling import RESAMPLING
from rltrain.data.seeding import stream_seed
from rltrain.engines.base import Request, Sample
from rltrain.envs.problems import Problem, reward_of
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.scored import Rollout


def rollout(pack: Pack, members: Sequence[Member]) -> list[tuple[Rollout, dict[str, float]]]:
    """These members' scored samples for their coming steps, with statistics; batches as dynamic
    sampling wants.
    """
    kinds = {member: member.recipe.trainer.algorithm.dynamic_sampling.type for member in members}
    collectors = {member: RESAMPLING[kind](member.recipe) for member, kind in kinds.items()}
    waiting = list(members)
    with pack.timer.span("rollout"):
        while waiting:
            scored = sample(pack, waiting)
            waiting = [batch.member for batch in scored if collectors[batch.member].add(batch)]
    return [
        collector.result()
        for member, collector in collectors.items()
        if member not in pack.failures
    ]


def sample(pack: Pack, members: Sequence[Member]) -> list[Rollout]:
    """The next batch of each of these members, scored, but for those that fail here; one engine
    call for all.
    """
    drawn = [(member, member.batches, member.draw_problems()) for member in members]
    requests = [
        request(
            pack,
            member,
            problem,
            member.recipe.generator.sampling_params,
            member.recipe.generator.n_samples_per_prompt,
            "sampling",
            batch,
            place,
        )
        for member, batch, problems in drawn
        for place, problem in enumerate(problems)
    ]
    batched = all(member.recipe.generator.batched for member in members)
    calls = [requests] if batched else [[one] for one in requests]
    groups = iter([group for call in calls for group in pack.engine.generate(call)])
    own = [(member, problems, [next(groups) for _ in problems]) for member, _, problems in drawn]
    scored = [
        pack.attempt(member, score, member, problems, samples) for member, problems, samples in own
    ]
    return [batch for batch in scored if batch is not None]


def request(
    pack: Pack, member: Member, problem: Problem, sampling: Sampling, n: int, *stream: str | int
) -> Request:
    """A request whose seed depends on the run's seed and the stream's name, and on nothing else."""
    return Request(
        problem.prompt_ids,
        n,
        stream_seed(member.recipe.seed, *stream),
        sampling,
        pack.served_as(member),
    )


def score(
    pack: Pack, member: Member, problems: Sequence[Problem], samples: list[list[Sample]]
) -> Rollout:
    """Decode completions and reward each against its problem's ground truth; every rank rewards its
    share.

    Raises UserError for a reward that raises, or is no finite number.
    """
    completions = [
        pack.tokenizer.batch_decode([s.token_ids for s in group], skip_special_tokens=True)
        for group in samples
    ]
    own = [
        [reward_of(problems[i].env, problems[i].example, text) for text in completions[i]]
        for i in pack.ranks.share(len(problems))
    ]
    rewards = torch.tensor(pack.ranks.interleave(own, len(problems)), dtype=torch.float32)
    return Rollout(member, list(problems), samples, completions, rewards)
