"""A model's trainable parameters with their optimizer and schedule: a policy, or a critic."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from harness.config.schema import Optimizer
from rltrain.algorithms.losses import Totals
from rltrain.data.batch import Batch
from rltrain.distributed.process_group import Ranks, full

Row = dict[str, float]
# Scalars that stay on the device that computes them: reading one from a GPU waits for it.
Statistics = dict[str, torch.Tensor]

RATIO_MEAN = "sampling/importance_sampling_ratio/mean"
RATIO_MAX = "sampling/importance_sampling_ratio/max"
GAP_MEAN = "sampling/sampling_logp_difference/mean"
GAP_MAX = "sampling/sampling_logp_difference/max"
MAXIMA = (GAP_MAX, RATIO_MAX)
"""Statistics of which the largest counts, over micro-batches, ranks and updates; others add up."""


def mean_over(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return a micro-batch's share of a mean over `count` values, float64, without gradient."""
    return values.detach().sum().double() / count


class TrainedModel(ABC):
    """Trainable parameters of one model: a loss per micro-batch, an AdamW step per mini-batch."""

    name: str
    """Names the checkpoint's files."""
    span: str
    """Names the time of its updates, `timing_s/<span>`."""
    prefix: str
    """Goes before the names of its metrics."""
    mini_batch_size: int
    """Prompts per optimizer step."""

    def __init__(
        self,
        model: Any,
        adapter: str,
        parameters: Mapping[str, torch.nn.Parameter],
        settings: Optimizer,
        total_steps: int,
        max_bad_steps: int,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.parameters = dict(parameters)
        self.bad_steps = 0
        self._max_norm = settings.max_grad_norm
        self._max_bad_steps = max_bad_steps
        sharded = [p for p in parameters.values() if isinstance(p, DTensor)]
        plain = [p for p in parameters.values() if not isinstance(p, DTensor)]
        # Sharded and plain tensors cannot share a parameter group.
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in (sharded, plain) if group],
            lr=settings.lr,
            fused=True,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
        )
        schedule = settings.scheduler.name
        self.scheduler = get_scheduler(
            "constant_with_warmup" if schedule == "constant" else schedule,
            self.optimizer,
            settings.num_warmup_steps,
            total_steps,
        )

    @abstractmethod
    def totals(self, batch: Batch) -> Totals:
        """Return the divisors of a mini-batch's loss."""

    @abstractmethod
    def loss(self, micro: Batch, totals: Totals) -> tuple[torch.Tensor, Statistics]:
        """Return a micro-batch's share of the mini-batch's loss and statistics."""

    def activate(self) -> None:
        """Make its adapter the one that computes and trains."""
        if isinstance(self.model, PeftModel):
            self.model.set_adapter(self.adapter)

    def needs_grad(self, batch: Batch) -> torch.Tensor:
        """Return which sequences need a backward pass, `[B]`; the others only add statistics."""
        return torch.ones(len(batch), dtype=torch.bool)

    def optimize(self, ranks: Ranks) -> Row:
        """Sum gradients over ranks, clip them, take an optimizer step and zero them.

        A non-finite gradient skips the step. Raises FloatingPointError after
        `trainer.max_bad_steps` skipped steps in a row.
        """
        ranks.sum_gradients(self.parameters.values())
        norm = self._clip_gradients()
        finite = math.isfinite(norm)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.bad_steps >= self._max_bad_steps:
            raise FloatingPointError(
                f"the {self.name}'s gradient was not finite {self.bad_steps} times in a row "
                f"(last norm {norm}): the learning rate is probably too high"
            )
        return {
            "learning_rate": self.learning_rate,
            "grad_norm": norm,
            "skipped_updates": float(not finite),
        }

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_step(self, step: int) -> None:
        """Set the learning rate of a training step; it is a function of the step alone."""
        self.scheduler.last_epoch = step
        for group, base, factor in zip(
            self.optimizer.param_groups,
            self.scheduler.base_lrs,
            self.scheduler.lr_lambdas,
            strict=True,
        ):
            group["lr"] = base * factor(step)

    def _clip_gradients(self) -> float:
        """Scale all gradients to the maximum norm; return the norm before."""
        groups = [
            [p for p in group["params"] if p.grad is not None]
            for group in self.optimizer.param_groups
        ]
        groups = [group for group in groups if group]
        norms = [
            full(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]))
            for group in groups
        ]
        norm = (
            torch.nn.utils.get_total_norm(norms)
            if len(norms) > 1
            else next(iter(norms), torch.tensor(0.0))
        )
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, self._max_norm, norm)
        return float(norm)
