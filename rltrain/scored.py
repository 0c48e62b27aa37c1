"""A member's scored samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from harness.records.files import write_bytes
from rltrain.data.batch import Batch, collate
from rltrain.engines.base import Sample
from rltrain.envs.problems import Problem
from rltrain.member import Member


@dataclass(slots=True)
class Rollout:
    """One member's scored samples: `problems` `[P]`, `samples` and `completions` `[P][G]`,
    `rewards` `[P, G]`.
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

    def batch(self, pad_id: int) -> Batch:
        """The samples as tensors."""
        samples = self.flat_samples
        group = len(self.samples[0])
        return collate(
            [problem.prompt_ids for problem in self.problems for _ in range(group)],
            [sample.token_ids for sample in samples],
            [sample.logprobs for sample in samples],
            pad_id=pad_id,
        )

    @property
    def cut(self) -> torch.Tensor:
        """Whether each completion was ended by the length limit, `[B]`, by the engine's finish
        reason.
        """
        return torch.tensor([sample.finish_reason == "length" for sample in self.flat_samples])

    def signal(self) -> list[int]:
        """The groups whose rewards differ: the others have no advantage to learn from."""
        equal = (self.rewards == self.rewards[:, :1]).all(dim=1)
        return [i for i, same in enumerate(equal.tolist()) if not same]

    def groups(self, order: Sequence[int]) -> Rollout:
        """Some groups, in this order; one may come several times."""
        return Rollout(
            self.member,
            [self.problems[i] for i in order],
            [self.samples[i] for i in order],
            [self.completions[i] for i in order],
            self.rewards[list(order)],
        )

    @classmethod
    def join(cls, parts: Sequence[Rollout]) -> Rollout:
        """Rollouts of one member as one."""
        return cls(
            parts[0].member,
            [problem for part in parts for problem in part.problems],
            [group for part in parts for group in part.samples],
            [group for part in parts for group in part.completions],
            torch.cat([part.rewards for part in parts]),
        )

    def statistics(self) -> dict[str, float]:
        """Rewards and lengths as metrics."""
        std = (
            self.rewards.std(dim=1) if self.rewards.shape[1] > 1 else torch.zeros(len(self.rewards))
        )
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
        return float(self.cut.float().mean())

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
