"""From prompts to completions to rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from harness.config.schema import Sampling
from harness.records.files import write_bytes
from rltrain.algorithms.dynamic_sampling import needs_another_batch, select_groups
from rltrain.data.batch import Batch, collate
from rltrain.data.seeding import stream_seed
from rltrain.engines.base import Request, Sample
from rltrain.envs.problems import Problem, reward_of
from rltrain.member import Member
from rltrain.pack import Pack


@dataclass(slots=True)
class Rollout:
    """One member's scored samples.

    `problems` `[P]`, `samples` and `completions` `[P][G]`, `rewards` `[P, G]`.
    """

    member: Member
    problems: list[Problem]
    samples: list[list[Sample]]
    completions: list[list[str]]
    rewards: torch.Tensor

    @property
    def flat_samples(self) -> list[Sample]:
        """All samples, group after group."""
        return [sample for group in self.samples for sample in group]

    @property
    def truncated(self) -> torch.Tensor:
        """Whether the length limit ended a completion, `[B]`, by the engine's finish reason."""
        return torch.tensor([sample.finish_reason == "length" for sample in self.flat_samples])

    def to_batch(self, pad_id: int) -> Batch:
        """Return the samples as tensors."""
        prompts = [p.prompt_ids for p in self.problems for _ in range(self.rewards.shape[1])]
        samples = self.flat_samples
        completions = [sample.token_ids for sample in samples]
        logprobs = [sample.logprobs for sample in samples]
        return collate(prompts, completions, logprobs, pad_id=pad_id)

    def select(self, groups: Sequence[int]) -> Rollout:
        """Return some groups, in this order; one may come several times."""
        return Rollout(
            self.member,
            [self.problems[i] for i in groups],
            [self.samples[i] for i in groups],
            [self.completions[i] for i in groups],
            self.rewards[list(groups)],
        )

    @classmethod
    def join(cls, parts: Sequence[Rollout]) -> Rollout:
        """Join the rollouts of one member."""
        return cls(
            parts[0].member,
            [problem for part in parts for problem in part.problems],
            [group for part in parts for group in part.samples],
            [group for part in parts for group in part.completions],
            torch.cat([part.rewards for part in parts]),
        )

    def length_statistics(self) -> tuple[float, float]:
        """Return the mean completion length in tokens and the share that the limit truncated."""
        lengths = [len(sample.token_ids) for sample in self.flat_samples]
        return sum(lengths) / len(lengths), float(self.truncated.float().mean())

    def statistics(self) -> dict[str, float]:
        """Return rewards and lengths as metrics of a training step."""
        rewards = self.rewards
        std = rewards.std(dim=1) if rewards.shape[1] > 1 else torch.zeros(len(rewards))
        mean_length, truncated = self.length_statistics()
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(std.mean()),
            "frac_reward_zero_std": float((std == 0).float().mean()),
            "completions/mean_length": mean_length,
            "completions/clipped_ratio": truncated,
        }

    def save(self, path: Path, *, step: int, phase: str, limit: int) -> None:
        """Write the first `limit` samples as parquet."""
        rows = [
            {
                "step": step,
                "phase": phase,
                "index": problem.example.index,
                "question": problem.example.question,
                "ground_truth": problem.example.ground_truth,
                "completion": text,
                "reward": float(reward),
                "num_tokens": len(sample.token_ids),
                "finish_reason": sample.finish_reason,
            }
            for problem, samples, texts, rewards in zip(
                self.problems, self.samples, self.completions, self.rewards, strict=True
            )
            for sample, text, reward in zip(samples, texts, rewards, strict=True)
        ]
        write_bytes(path, pd.DataFrame(rows[:limit]).to_parquet())


def sample_rollouts(
    pack: Pack, members: Sequence[Member]
) -> dict[Member, tuple[Rollout, dict[str, float]]]:
    """Sample and score the next batch of each member, in joint engine calls.

    Dynamic sampling may sample several batches for a step. Members that fail here are left out.

    Returns:
        The groups to train on, and metrics of all that was sampled.
    """
    batches: dict[Member, list[Rollout]] = {member: [] for member in members}
    waiting = list(members)
    with pack.span("rollout"):
        while waiting:
            for rollout in _sample_batches(pack, waiting):
                batches[rollout.member].append(rollout)
            waiting = [
                member
                for member in waiting
                if member not in pack.failures
                and needs_another_batch(member.recipe, [r.rewards for r in batches[member]])
            ]
    selected = {}
    for member in members:
        if member not in pack.failures:
            sampled = Rollout.join(batches[member])
            groups, metrics = select_groups(member.recipe, sampled.rewards)
            selected[member] = (sampled.select(groups), sampled.statistics() | metrics)
    return selected


def _sample_batches(pack: Pack, members: Sequence[Member]) -> list[Rollout]:
    """Sample and score one batch of each member; one engine call for all, if recipes allow it."""
    problems = {member: member.next_problems() for member in members}
    requests = [
        request(
            pack,
            member,
            problem,
            member.recipe.generator.sampling_params,
            member.recipe.generator.n_samples_per_prompt,
            "sampling",
            member.batches - 1,
            index,
        )
        for member in members
        for index, problem in enumerate(problems[member])
    ]
    batched = all(member.recipe.generator.batched for member in members)
    calls = [requests] if batched else [[request] for request in requests]
    groups = iter([group for call in calls for group in pack.engine.generate(call)])
    samples = {member: [next(groups) for _ in problems[member]] for member in members}
    rollouts = [
        pack.isolate(member, score, pack, member, problems[member], samples[member])
        for member in members
    ]
    return [rollout for rollout in rollouts if rollout is not None]


def request(
    pack: Pack, member: Member, problem: Problem, sampling: Sampling, n: int, *stream: str | int
) -> Request:
    """Return a request whose seed depends on the run's seed and the stream's name alone."""
    seed = stream_seed(member.recipe.seed, *stream)
    return Request(problem.prompt_ids, n, seed, sampling, pack.served_as(member))


def score(
    pack: Pack, member: Member, problems: Sequence[Problem], samples: list[list[Sample]]
) -> Rollout:
    """Decode completions and reward each against its problem's ground truth.

    Each rank rewards its share. Raises UserError for a reward that raises, or is not finite.
    """
    completions = [
        pack.tokenizer.batch_decode([s.token_ids for s in group], skip_special_tokens=True)
        for group in samples
    ]
    share = [
        [reward_of(problems[i].env, problems[i].example, text) for text in completions[i]]
        for i in pack.ranks.share(len(problems))
    ]
    rewards = torch.tensor(pack.ranks.interleave(share, len(problems)), dtype=torch.float32)
    return Rollout(member, list(problems), samples, completions, rewards)
