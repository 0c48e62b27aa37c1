"""Prompts to samples to rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from harness.rundir import write_bytes
from harness.schema import Sampling
from rltrain.batch import Batch, collate
from rltrain.engines.base import Request, Sample
from rltrain.pack import Member, Pack
from rltrain.problems import Problem
from rltrain.seeding import stream_seed


@dataclass(slots=True)
class Rollout:
    """One member's scored samples: `problems` `[P]`, `samples` and `completions` `[P][G]`, `rewards` `[P, G]`."""

    member: Member
    problems: list[Problem]
    samples: list[list[Sample]]
    completions: list[list[str]]
    rewards: torch.Tensor

    @property
    def flat_samples(self) -> list[Sample]:
        """All samples, group after group."""
        return [sample for group in self.samples for sample in group]

    def batch(self, pack: Pack) -> Batch:
        """The samples as tensors on the pack's device."""
        samples = self.flat_samples
        group = len(self.samples[0])
        return collate(
            [problem.prompt_ids for problem in self.problems for _ in range(group)],
            [sample.token_ids for sample in samples],
            [sample.logprobs for sample in samples],
            pad_id=pack.stop_token_ids[0],
            device=pack.device,
        )

    def statistics(self) -> dict[str, float]:
        """Rewards and lengths as metrics."""
        std = self.rewards.std(dim=1) if self.rewards.shape[1] > 1 else torch.zeros(len(self.rewards))
        return {
            "reward": float(self.rewards.mean()),
            "reward_std": float(std.mean()),
            "frac_reward_zero_std": float((std == 0).float().mean()),
            "completions/mean_length": self.mean_length,
            "completions/clipped_ratio": self.clipped_ratio,
        }

    @property
    def mean_length(self) -> float:
        """Mean completion length in tokens."""
        return sum(len(s.token_ids) for s in self.flat_samples) / len(self.flat_samples)

    @property
    def clipped_ratio(self) -> float:
        """Share of completions the length limit cut."""
        return sum(s.finish_reason == "length" for s in self.flat_samples) / len(self.flat_samples)

    def save(self, path: Path, *, step: int, phase: str, limit: int) -> None:
        """Write the first `limit` samples as parquet."""
        rows = [
            {
                "step": step, "phase": phase, "index": problem.example.index, "question": problem.example.question,
                "ground_truth": problem.example.ground_truth, "completion": text, "reward": float(reward),
                "num_tokens": len(sample.token_ids), "finish_reason": sample.finish_reason,
            }
            for problem, samples, texts, rewards in zip(
                self.problems, self.samples, self.completions, self.rewards, strict=True)
            for sample, text, reward in zip(samples, texts, rewards, strict=True)
        ]  # fmt: skip
        write_bytes(path, pd.DataFrame(rows[:limit]).to_parquet())


def rollout(pack: Pack) -> list[Rollout]:
    """Every member's prompts x samples for the coming step, scored; one engine call for all members."""
    problems_M = [member.batch_problems() for member in pack.members]
    requests = [
        request(pack, member, problem, member.recipe.generator.sampling_params,
                member.recipe.generator.n_samples_per_prompt, "sampling", member.step, place)
        for member, problems in zip(pack.members, problems_M, strict=True)
        for place, problem in enumerate(problems)
    ]  # fmt: skip
    batched = all(member.recipe.generator.batched for member in pack.members)
    with pack.timer.span("rollout"):
        calls = [requests] if batched else [[one] for one in requests]
        groups = iter([group for call in calls for group in pack.engine.generate(call)])
        return [
            score(pack, member, problems, [next(groups) for _ in problems])
            for member, problems in zip(pack.members, problems_M, strict=True)
        ]


def request(pack: Pack, member: Member, problem: Problem, sampling: Sampling, n: int, *stream: str | int) -> Request:
    """A request whose seed depends on the run's seed and the stream's name, and on nothing else."""
    return Request(problem.prompt_ids, n, stream_seed(member.recipe.seed, *stream), sampling, pack.served_as(member))


def score(pack: Pack, member: Member, problems: Sequence[Problem], samples: list[list[Sample]]) -> Rollout:
    """Decode completions and reward each against its problem's ground truth."""
    completions = [
        pack.tokenizer.batch_decode([s.token_ids for s in group], skip_special_tokens=True) for group in samples
    ]
    rewards = torch.tensor(
        [
            [problem.env.reward(text, problem.example.ground_truth) for text in texts]
            for problem, texts in zip(problems, completions, strict=True)
        ],
        dtype=torch.float32,
    )
    return Rollout(member, list(problems), samples, completions, rewards)
