"""Member: one training run in a pack."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from harness.config.schema import Recipe, Sampling
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from rltrain.algorithms.credit import Credit
from rltrain.algorithms.critic import Critic
from rltrain.algorithms.learner import Learner
from rltrain.algorithms.policy import Policy
from rltrain.data.seeding import permutation
from rltrain.distributed import placement as parallel
from rltrain.envs.problems import Problem
from rltrain.sync.base import Sync

DEFAULT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(eq=False)
class Member:
    """One training run in a pack: what it trains, its data, counters and directory.

    `max_tokens` are those of one of its passes at most. `batches` counts the batches of problems
    drawn so far: the data's cursor, which runs ahead of `step` where dynamic sampling draws several
    for one step.
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
    credit: Credit = field(init=False)
    metrics: MetricsFile = field(init=False)
    step: int = 0
    batches: int = 0
    version: int = 0
    num_tokens: int = 0
    step_tokens: int = 0
    best: dict[str, float] | None = None

    def __post_init__(self) -> None:
        self.credit = Credit(self.recipe)
        self.metrics = MetricsFile(self.run_dir.metrics)

    @property
    def learners(self) -> list[Learner]:
        """What is trained, in the order it is: the critic first, so that its loss is of the values
        that were used.
        """
        return [self.policy] if self.critic is None else [self.critic, self.policy]

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether updates see another policy than the one that sampled (several a step, or
        dropout), or rewards KL.
        """
        trainer = self.recipe.trainer
        updates = trainer.update_epochs_per_batch * (
            trainer.train_batch_size // trainer.policy_mini_batch_size
        )
        return (
            updates > 1
            or trainer.policy.model.lora.dropout > 0
            or trainer.algorithm.use_kl_in_reward
        )

    @property
    def total_steps(self) -> int:
        """`trainer.max_steps` if set, else whole batches in `trainer.epochs` passes over
        the data.
        """
        return total_steps(self.recipe, len(self.problems))

    def limit_passes(self, tokens: int) -> None:
        """Have passes of at most so many tokens from now on, for one ran out of memory; the
        manifest keeps it.
        """
        self.max_tokens = tokens
        earlier = self.run_dir.read_manifest().get("out_of_memory", [])
        self.run_dir.update(out_of_memory=[*earlier, {"step": self.step + 1, "tokens": tokens}])

    def draw_problems(self) -> list[Problem]:
        """The next batch of problems: each epoch a new shuffle of the data, whole batches only."""
        size = self.recipe.trainer.train_batch_size
        epoch, batch = divmod(self.batches, len(self.problems) // size)
        order = permutation(self.recipe.seed, "data", epoch, length=len(self.problems))
        self.batches += 1
        return [self.problems[i] for i in order[batch * size : (batch + 1) * size]]


def total_steps(recipe: Recipe, num_problems: int) -> int:
    """`trainer.max_steps` if set, else whole batches in `trainer.epochs` passes over so many
    problems.
    """
    trainer = recipe.trainer
    return trainer.max_steps or trainer.epochs * (num_problems // trainer.train_batch_size)


def sync_tolerance(recipe: Recipe) -> float:
    """The mean gap between engine and trainer that fails the run, in nats.

    Top-p and top-k renormalise the engine's log-probabilities: with them no gap is the sync's
    fault, unless one is set.
    """
    if recipe.trainer.sync_tolerance is None and truncates(recipe.generator.sampling_params):
        return math.inf
    return recipe.trainer.sync_tolerance or DEFAULT_TOLERANCE[parallel.dtype_of(recipe)]


def truncates(sampling: Sampling) -> bool:
    """Whether top-p or top-k is on: the engine's log-probabilities are then not those of the whole
    distribution.
    """
    return sampling.top_p < 1 or sampling.top_k > 0
