"""A member's policy: the adapter (or, at rank 0, all weights) that samples and that the policy loss
trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel

from harness.config.schema import Recipe
from rltrain.algorithms.learner import Learner, Row, Statistics, mean_over
from rltrain.algorithms.losses import Totals
from rltrain.algorithms.objective import Objective
from rltrain.data.batch import Batch
from rltrain.models.logprobs import Reference, token_logprobs, token_logprobs_and_entropy
from rltrain.models.lora import adapter_off
from rltrain.sync.check import PROBE_ROWS, certain, check_gap, check_sync

# A function of sequences over all of a batch, in passes that fit into memory: `[B, T]`.
OverRows = Callable[[Batch, Callable[[Batch], torch.Tensor]], torch.Tensor]

GAP_MEAN = "sampling/sampling_logp_difference/mean"
GAP_MAX = "sampling/sampling_logp_difference/max"


class Policy(Learner):
    """Trains the policy loss; `reference` is what KL is measured against, None where no KL is
    wanted.
    """

    name = "policy"
    prefix = ""

    def __init__(
        self,
        adapter: str,
        model: Any,
        parameters: Mapping[str, torch.nn.Parameter],
        recipe: Recipe,
        reference: Reference | None,
        total_steps: int,
        tolerance: float,
    ) -> None:
        trainer = recipe.trainer
        super().__init__(
            parameters, trainer.policy.optimizer_config, total_steps, trainer.max_bad_steps
        )
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

    def prove(self, batch: Batch, temperature: float, over_rows: OverRows) -> None:
        """Raise SyncError unless the engine drew a batch's samples from this very policy, adapter
        on.

        Where the batch's own log-probabilities do not say so, those of its first sequences are
        computed, by `over_rows`, with the adapter on and then off.
        """
        self.activate()
        real = batch.mask.bool()
        if batch.old_logprobs is not None and certain(
            batch.engine_logprobs[real], batch.old_logprobs[real], self._tolerance
        ):
            return
        probe = batch.take(range(min(PROBE_ROWS, len(batch))))
        real = probe.mask.bool()
        engine = probe.engine_logprobs[real]

        def logprobs() -> torch.Tensor:
            return over_rows(probe, lambda micro: token_logprobs(self.model, micro, temperature))[
                real
            ]

        on, off = logprobs(), None
        if isinstance(self.model, PeftModel) and not certain(engine, on, self._tolerance):
            with adapter_off(self.model):
                off = logprobs()
        check_sync(engine, on, off, tolerance=self._tolerance)

    def totals(self, batch: Batch) -> Totals:
        """The divisors of a mini-batch's loss."""
        return self._objective.totals(batch)

    def loss(self, micro: Batch, totals: Totals) -> tuple[torch.Tensor, Statistics]:
        """A micro-batch's share of policy loss and KL term.

        Where old log-probabilities were not needed apart, the policy is still the one that sampled,
        and these are they.
        """
        logprobs, entropy = token_logprobs_and_entropy(self.model, micro, self.temperature)
        micro = micro.to(self.model.device)
        if micro.old_logprobs is None:
            micro.old_logprobs = logprobs.detach()
        loss, seen = self._objective(logprobs, micro, totals)
        gap = (micro.engine_logprobs - micro.old_logprobs).abs() * micro.loss_mask
        return loss, seen | {
            "entropy": mean_over(entropy * micro.loss_mask, totals.tokens),
            GAP_MEAN: mean_over(gap, totals.tokens),
            GAP_MAX: gap.max(),
        }

    def moves(self, batch: Batch) -> torch.Tensor:
        """All sequences under a KL term; else those with an advantage, which is a factor of every
        policy loss.
        """
        assert batch.advantages is not None
        return (batch.advantages * batch.loss_mask).any(dim=1) | (
            self._objective.kl_coef is not None
        )

    def check(self, stats: Row, batch: Batch, over_rows: OverRows) -> None:
        """Raise SyncError when a mini-batch's statistics say that the engine did not sample from
        this policy.
        """
        if batch.old_logprobs is None and not stats[GAP_MEAN] < self._tolerance / 2:
            self.prove(batch, self.temperature, over_rows)
        check_gap(stats[GAP_MEAN], stats[GAP_MAX], self._tolerance)
