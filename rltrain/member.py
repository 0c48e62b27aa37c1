"""A member: one training run in a pack."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch

from harness.config.schema import Recipe, Sampling
from harness.config.shapes import needs_old_logprobs
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from rltrain.algorithms.critic import Critic
from rltrain.algorithms.policy import Policy
from rltrain.algorithms.trained_model import TrainedModel
from rltrain.data.seeding import permutation
from rltrain.distributed import placement
from rltrain.envs.problems import Problem
from rltrain.sync.base import Sync

DEFAULT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(eq=False)
class Member:
    """One training run in a pack: what it trains, its data, counters and directory.

    Attributes:
        max_tokens: the most tokens of one of its micro-batches; None: no limit.
        step: training steps taken.
        batches: batches of prompts sampled; dynamic sampling samples several per step.
        version: of the adapter that the engine serves.
        seconds_before: training time of earlier processes, where the run was resumed.
    """

    name: str
    recipe: Recipe
    run_dir: RunDir
    problems: list[Problem]
    held_out: list[Problem]
    num_dropped: int
    policy: Policy
    critic: Critic | None
    sync: Sync
    max_tokens: int | None
    metrics: MetricsFile = field(init=False)
    step: int = 0
    batches: int = 0
    version: int = 0
    num_tokens: int = 0
    step_tokens: int = 0
    best: dict[str, float] | None = None
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.metrics = MetricsFile(self.run_dir.metrics)

    @property
    def trained_models(self) -> list[TrainedModel]:
        """What is trained, the critic first: its loss is then of the values that were used."""
        return [self.policy] if self.critic is None else [self.critic, self.policy]

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether a step computes the log-probabilities of the policy that sampled, apart."""
        return needs_old_logprobs(self.recipe)

    @property
    def total_steps(self) -> int:
        """`trainer.max_steps` if set, else the whole batches of `trainer.epochs` epochs."""
        return total_steps(self.recipe, len(self.problems))

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.total_steps

    def seconds(self) -> float:
        """Return the training time so far, over all processes."""
        return self.seconds_before + time.perf_counter() - self.started

    def limit_tokens(self, tokens: int) -> None:
        """Limit micro-batches to so many tokens, after one ran out of memory, and record it."""
        self.max_tokens = tokens
        earlier = self.run_dir.read_manifest().get("out_of_memory", [])
        event = {"step": self.step + 1, "tokens": tokens}
        self.run_dir.update(out_of_memory=[*earlier, event])

    def next_problems(self) -> list[Problem]:
        """Return the next batch of problems; each epoch shuffles the data, whole batches only."""
        size = self.recipe.trainer.train_batch_size
        epoch, batch = divmod(self.batches, len(self.problems) // size)
        order = permutation(self.recipe.seed, "data", epoch, length=len(self.problems))
        self.batches += 1
        return [self.problems[i] for i in order[batch * size : (batch + 1) * size]]


def total_steps(recipe: Recipe, num_problems: int) -> int:
    """Return `trainer.max_steps` if set, else whole batches in `trainer.epochs` epochs."""
    trainer = recipe.trainer
    return trainer.max_steps or trainer.epochs * (num_problems // trainer.train_batch_size)


def sync_tolerance(recipe: Recipe) -> float:
    """Return the mean gap between engine and trainer, in nats, above which a run fails.

    Top-p and top-k renormalise the engine's log-probabilities: with them no gap is an error,
    unless `trainer.sync_tolerance` is set.
    """
    if recipe.trainer.sync_tolerance is None and truncates(recipe.generator.sampling_params):
        return math.inf
    return recipe.trainer.sync_tolerance or DEFAULT_TOLERANCE[placement.dtype_of(recipe)]


def truncates(sampling: Sampling) -> bool:
    """Return whether top-p or top-k renormalises the engine's log-probabilities."""
    return sampling.top_p < 1 or sampling.top_k > 0
