"""A member's policy: the adapter (or, at rank 0, all weights) that samples and that the policy loss trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from harness.schema import Recipe
from rltrain.batch import Batch
from rltrain.learner import Learner, Row
from rltrain.logprobs import token_logprobs, token_logprobs_and_entropy
from rltrain.losses import Totals
from rltrain.model import Reference
from rltrain.objective import Objective
from rltrain.probe import certain, check_gap, prove_sync

GAP_MEAN = "sampling/sampling_logp_difference/mean"
GAP_MAX = "sampling/sampling_logp_difference/max"


class Policy(Learner):
    """Trains the policy loss; `reference` is what KL is measured against, None where no KL is wanted."""

    name = "policy"
    prefix = ""

    def __init__(
        self, adapter: str, model: Any, parameters: Mapping[str, torch.nn.Parameter], recipe: Recipe,
        reference: Reference | None, total_steps: int, tolerance: float,
    ) -> None:  # fmt: skip
        trainer = recipe.trainer
        super().__init__(parameters, trainer.policy.optimizer_config, total_steps, trainer.max_bad_steps)
        self.adapter = adapter
        self.model = model
        self.reference = reference
        self.mini_batch_size = trainer.policy_mini_batch_size
        self.temperature = recipe.generator.sampling_params.temperature
        self._objective = Objective(recipe)
        self._tolerance = tolerance

    def activate(self) -> None:
        """Make its adapter the one that computes and trains."""
        if isinstance(self.model, PeftModel):
            self.model.set_adapter(self.adapter)

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities of the completions' tokens at the sampling temperature, `[B, T]`."""
        return token_logprobs(self.model, batch, self.temperature)

    def reference_logprobs(self, batch: Batch) -> torch.Tensor:
        """The same under the reference, `[B, T]`."""
        assert self.reference is not None
        return self.reference.logprobs(batch, self.temperature)

    def prove(self, batch: Batch, temperature: float) -> None:
        """Raise SyncError unless the engine drew a batch's samples from this very policy."""
        self.activate()
        real = batch.mask.bool()
        if batch.old_logprobs is not None and certain(
            batch.engine_logprobs[real], batch.old_logprobs[real], self._tolerance
        ):
            return
        adapter = isinstance(self.model, PeftModel)
        prove_sync(self.model, batch, temperature, tolerance=self._tolerance, adapter=adapter)

    def totals(self, batch: Batch) -> Totals:
        """The divisors of a mini-batch's loss."""
        return self._objective.totals(batch)

    def loss(self, micro: Batch, totals: Totals) -> tuple[torch.Tensor, Row]:
        """A micro-batch's share of policy loss and KL term.

        Where old log-probabilities were not needed apart, the policy is still the one that sampled, and these are they.
        """
        logprobs, entropy = token_logprobs_and_entropy(self.model, micro, self.temperature)
        if micro.old_logprobs is None:
            micro.old_logprobs = logprobs.detach()
        loss, seen = self._objective(logprobs, micro, totals)
        gap = (micro.engine_logprobs - micro.old_logprobs).abs() * micro.loss_mask
        return loss, seen | {
            "entropy": float((entropy * micro.loss_mask).sum()) / totals.tokens,
            GAP_MEAN: float(gap.sum()) / totals.tokens,
            GAP_MAX: float(gap.max()),
        }

    def moves(self, batch: Batch) -> torch.Tensor:
        """All sequences under a KL term; else those with an advantage, which is a factor of every policy loss."""
        assert batch.advantages is not None
        return (batch.advantages * batch.loss_mask).any(dim=1) | (self._objective.kl_coef is not None)

    def check(self, stats: Row, batch: Batch) -> None:
        """Raise SyncError when the engine did not sample from this policy."""
        if batch.old_logprobs is None and not stats[GAP_MEAN] < self._tolerance / 2:
            self.prove(batch, self.temperature)
        check_gap(stats[GAP_MEAN], stats[GAP_MAX], self._tolerance)
