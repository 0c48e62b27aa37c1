"""What a member trains: parameters with their optimizer and schedule. Its policy is one, its critic
another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from harness.config.schema import Optimizer
from rltrain.algorithms.losses import Totals
from rltrain.data.batch import Batch
from rltrain.distributed.process_group import Ranks, full

Row = dict[str, float]
# Numbers that a pass leaves where they are computed: to read one of a GPU's is to wait for it.
Statistics = dict[str, torch.Tensor]


def mean_over(values: torch.Tensor, count: int) -> torch.Tensor:
    """A micro-batch's share of a mean over `count` values of the whole mini-batch, float64, without
    gradient.
    """
    return values.detach().sum().double() / count


class Learner(ABC):
    """Trainable parameters of one model, and how they are trained: a loss a micro-batch, an AdamW
    step a mini-batch.
    """

    name: str
    """The checkpoint's files and the timings are named after it."""
    adapter: str
    """Its adapter on the model; at rank 0 there is none of that name."""
    prefix: str
    """Goes before its metrics' names."""
    model: Any
    mini_batch_size: int
    """Prompts an optimizer step."""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        settings: Optimizer,
        total_steps: int,
        max_bad_steps: int,
    ) -> None:
        self.parameters = dict(parameters)
        self.bad_steps = 0
        self._max_norm = settings.max_grad_norm
        self._max_bad_steps = max_bad_steps
        kinds = [
            [p for p in parameters.values() if isinstance(p, DTensor) is sharded]
            for sharded in (True, False)
        ]
        # Sharded and plain tensors do not mix in one group. Fused, one call does what is some
        # hundreds otherwise.
        self.optimizer = torch.optim.AdamW(
            [{"params": kind} for kind in kinds if kind],
            lr=settings.lr,
            fused=True,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
        )
        schedule = (
            "constant_with_warmup"
            if settings.scheduler.name == "constant"
            else settings.scheduler.name
        )
        self.scheduler = get_scheduler(
            schedule, self.optimizer, settings.num_warmup_steps, total_steps
        )

    @abstractmethod
    def activate(self) -> None:
        """Make its adapter the one that computes and trains."""

    @abstractmethod
    def totals(self, batch: Batch) -> Totals:
        """The divisors of a mini-batch's loss."""

    @abstractmethod
    def loss(self, micro: Batch, totals: Totals) -> tuple[torch.Tensor, Statistics]:
        """A micro-batch's share of the mini-batch's loss, and of its statistics."""

    def moves(self, batch: Batch) -> torch.Tensor:
        """Whether each sequence can have a gradient, `[B]`: those that cannot are seen, but not
        gone back through.
        """
        return torch.ones(len(batch), dtype=torch.bool)

    def optimize(self, ranks: Ranks) -> Row:
        """Clip, step and zero; FloatingPointError after `trainer.max_bad_steps` non-finite
        gradients in a row.
        """
        ranks.sum_gradients(self.parameters.values())
        norm = self._clip()
        finite = math.isfinite(norm)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.bad_steps >= self._max_bad_steps:
            raise FloatingPointError(
                f"the {self.name}'s gradient was not finite {self.bad_steps} times in a "
                f"row (last norm {norm}): "
                "the learning rate is probably too high"
            )
        return {
            "learning_rate": self.learning_rate,
            "grad_norm": norm,
            "skipped_updates": float(not finite),
        }

    @property
    def learning_rate(self) -> float:
        """The learning rate of the coming update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_step(self, step: int) -> None:
        """Bring the learning rate to where it is after so many steps: it is a function of the step
        alone.
        """
        self.scheduler.last_epoch = step
        for group, base, factor in zip(
            self.optimizer.param_groups,
            self.scheduler.base_lrs,
            self.scheduler.lr_lambdas,
            strict=True,
        ):
            group["lr"] = base * factor(step)

    def _clip(self) -> float:
        """Scale all gradients to the largest norm allowed; the norm before."""
        kinds = [
            [p for p in group["params"] if p.grad is not None]
            for group in self.optimizer.param_groups
        ]
        kinds = [kind for kind in kinds if kind]
        norms = [
            full(torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]))
            for kind in kinds
        ]
        norm = (
            torch.nn.utils.get_total_norm(norms)
            if len(norms) > 1
            else next(iter(norms), torch.tensor(0.0))
        )
        for kind in kinds:
            torch.nn.utils.clip_grads_with_norm_(kind, self._max_norm, norm)
        return float(norm)
