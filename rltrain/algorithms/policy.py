"""The policy: the adapter (at rank 0, all weights) that samples, and the loss that trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel

from harness.config.schema import TIS as Correction
from harness.config.schema import LossReduction, PolicyLoss, Recipe
from rltrain.algorithms.losses import (
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REDUCTIONS,
    TIS,
    PolicyInputs,
    Totals,
)
from rltrain.algorithms.trained_model import (
    GAP_MAX,
    GAP_MEAN,
    RATIO_MAX,
    RATIO_MEAN,
    Row,
    Statistics,
    TrainedModel,
    mean_over,
)
from rltrain.data.batch import Batch
from rltrain.models.logprobs import Reference, token_logprobs, token_logprobs_and_entropy
from rltrain.models.lora import adapter_off
from rltrain.sync.check import PROBE_ROWS, certain, check_gap, check_sync

# Computes `[B, T]` over a batch, by calling a function of micro-batches.
InMicroBatches = Callable[[Batch, Callable[[Batch], torch.Tensor]], torch.Tensor]


class Policy(TrainedModel):
    """Policy loss, KL term and importance correction of one member, as its recipe sets them.

    `reference` is the model that KL is measured against, None where no KL is wanted.
    """

    name = "policy"
    span = "update"
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
        trainer, algorithm = recipe.trainer, recipe.trainer.algorithm
        optimizer = trainer.policy.optimizer_config
        super().__init__(model, adapter, parameters, optimizer, total_steps, trainer.max_bad_steps)
        self.reference = reference
        self.mini_batch_size = trainer.policy_mini_batch_size
        self.temperature = recipe.generator.sampling_params.temperature
        self._tolerance = tolerance
        self._policy_loss = POLICY_LOSSES[algorithm.policy_loss_type.name]
        self._clip = (algorithm.eps_clip_low, algorithm.eps_clip_high, algorithm.clip_ratio_c)
        # Dr. GRPO is the clipped loss with this reduction, and advantages without a division by
        # the standard deviation.
        dr_grpo = algorithm.policy_loss_type is PolicyLoss.dr_grpo
        reduction = LossReduction.seq_mean_token_sum_norm if dr_grpo else algorithm.loss_reduction
        self._reduce = REDUCTIONS[reduction.name]
        self._correct = None if algorithm.tis is Correction.none else TIS[algorithm.tis.name]
        self._correction_cap = algorithm.tis_imp_ratio_cap
        self._kl = KL_ESTIMATORS[algorithm.kl_estimator.name]
        self._kl_coef = algorithm.kl_loss_coef if algorithm.use_kl_loss else None
        self._max_length = recipe.generator.sampling_params.max_generate_length

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Return log-probabilities of the completion tokens at the temperature, `[B, T]`."""
        return token_logprobs(self.model, batch, self.temperature)

    def reference_logprobs(self, batch: Batch) -> torch.Tensor:
        """Return the same under the reference model, `[B, T]`."""
        assert self.reference is not None
        return self.reference.logprobs(batch, self.temperature)

    def totals(self, batch: Batch) -> Totals:
        """Return the divisors of a mini-batch's loss; untrained sequences do not count."""
        sequences = int(batch.loss_mask.any(dim=1).sum())
        return Totals(
            tokens=max(1, batch.tokens), sequences=max(1, sequences), max_length=self._max_length
        )

    def loss(self, micro: Batch, totals: Totals) -> tuple[torch.Tensor, Statistics]:
        """Return a micro-batch's share of the policy loss and KL term, and of the statistics.

        Without old log-probabilities the policy is still the one that sampled: its own are they.
        """
        logprobs, entropy = token_logprobs_and_entropy(self.model, micro, self.temperature)
        micro = micro.to(self.model.device)
        if micro.old_logprobs is None:
            micro.old_logprobs = logprobs.detach()
        loss, stats = self.objective(logprobs, micro, totals)
        gap = (micro.engine_logprobs - micro.old_logprobs).abs() * micro.loss_mask
        return loss, stats | {
            "entropy": mean_over(entropy * micro.loss_mask, totals.tokens),
            GAP_MEAN: mean_over(gap, totals.tokens),
            GAP_MAX: gap.max(),
        }

    def objective(
        self, logprobs_BT: torch.Tensor, micro: Batch, totals: Totals
    ) -> tuple[torch.Tensor, Statistics]:
        """Return the loss of log-probabilities `[B, T]` on a micro-batch, and its statistics."""
        old, mask = micro.old_logprobs, micro.loss_mask
        assert old is not None
        assert micro.advantages is not None
        inputs = PolicyInputs(logprobs_BT, old, micro.advantages, mask, *self._clip)
        losses, clipped = self._policy_loss(inputs)
        stats: Statistics = {"clip_ratio/region_mean": mean_over(clipped * mask, totals.tokens)}
        if self._correct is not None:
            weights = self._correct(old, micro.engine_logprobs, mask, self._correction_cap)
            losses = losses * weights
            stats[RATIO_MEAN] = mean_over(weights * mask, totals.tokens)
            stats[RATIO_MAX] = (weights * mask).max()
        loss = self._reduce(losses, mask, totals)
        if self._kl_coef is not None:
            assert micro.ref_logprobs is not None
            kl = self._kl(logprobs_BT, micro.ref_logprobs)
            loss = loss + self._kl_coef * self._reduce(kl, mask, totals)
            stats["kl"] = mean_over(kl * mask, totals.tokens)
        stats["loss"] = loss.detach().double()
        return loss, stats

    def needs_grad(self, batch: Batch) -> torch.Tensor:
        """Return which sequences have a gradient, `[B]`.

        All have one under a KL term, else those with an advantage, a factor of every policy loss.
        """
        assert batch.advantages is not None
        return (batch.advantages * batch.loss_mask).any(dim=1) | (self._kl_coef is not None)

    def check_engine(
        self, batch: Batch, temperature: float, in_micro_batches: InMicroBatches
    ) -> None:
        """Raise SyncError unless the engine drew a batch's samples from this very adapter.

        Where the batch's own log-probabilities leave that open, those of its first sequences are
        computed with the adapter on and off.
        """
        self.activate()
        real = batch.mask.bool()
        if batch.old_logprobs is not None and certain(
            batch.engine_logprobs[real], batch.old_logprobs[real], self._tolerance
        ):
            return
        few = batch.take(range(min(PROBE_ROWS, len(batch))))
        real = few.mask.bool()
        engine = few.engine_logprobs[real]

        def logprobs() -> torch.Tensor:
            return in_micro_batches(
                few, lambda micro: token_logprobs(self.model, micro, temperature)
            )[real]

        adapter_on, base = logprobs(), None
        if isinstance(self.model, PeftModel) and not certain(engine, adapter_on, self._tolerance):
            with adapter_off(self.model):
                base = logprobs()
        check_sync(engine, adapter_on, base, tolerance=self._tolerance)

    def check_statistics(self, stats: Row, batch: Batch, in_micro_batches: InMicroBatches) -> None:
        """Raise SyncError where a mini-batch's statistics show another policy in the engine."""
        if batch.old_logprobs is None and not stats[GAP_MEAN] < self._tolerance / 2:
            self.check_engine(batch, self.temperature, in_micro_batches)
        check_gap(stats[GAP_MEAN], stats[GAP_MAX], self._tolerance)
