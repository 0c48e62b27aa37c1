"""What a policy minimises: policy loss, importance correction and KL, chosen once from its
recipe.
"""

from __future__ import annotations

import torch

from harness.config.schema import TIS as Correction
from harness.config.schema import LossReduction, PolicyLoss, Recipe
from rltrain.algorithms.learner import Statistics, mean_over
from rltrain.algorithms.losses import (
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REDUCTIONS,
    TIS,
    PolicyInputs,
    Totals,
)
from rltrain.data.batch import Batch

RATIO_MEAN = "sampling/importance_sampling_ratio/mean"
RATIO_MAX = "sampling/importance_sampling_ratio/max"


class Objective:
    """Policy loss, KL term and reduction of one member, bound to its recipe's settings."""

    def __init__(self, recipe: Recipe) -> None:
        algorithm = recipe.trainer.algorithm
        self.policy_loss = POLICY_LOSSES[algorithm.policy_loss_type.name]
        self.kl = KL_ESTIMATORS[algorithm.kl_estimator.name]
        self.kl_coef = algorithm.kl_loss_coef if algorithm.use_kl_loss else None
        # Dr. GRPO is the clipped loss with this reduction, and advantages that no standard
        # deviation divides.
        dr_grpo = algorithm.policy_loss_type is PolicyLoss.dr_grpo
        reduction = LossReduction.seq_mean_token_sum_norm if dr_grpo else algorithm.loss_reduction
        self.reduce = REDUCTIONS[reduction.name]
        self.clip = (algorithm.eps_clip_low, algorithm.eps_clip_high, algorithm.clip_ratio_c)
        self.correct = None if algorithm.tis is Correction.none else TIS[algorithm.tis.name]
        self.cap = algorithm.tis_imp_ratio_cap
        self.max_length = recipe.generator.sampling_params.max_generate_length

    def totals(self, batch: Batch) -> Totals:
        """The divisors of a mini-batch's loss; sequences that are not trained on do not count."""
        sequences = int(batch.loss_mask.any(dim=1).sum())
        return Totals(
            tokens=max(1, batch.tokens), sequences=max(1, sequences), max_length=self.max_length
        )

    def __call__(
        self, logprobs_BT: torch.Tensor, batch: Batch, totals: Totals
    ) -> tuple[torch.Tensor, Statistics]:
        """A micro-batch's share of the loss, and of the mini-batch's means `loss`, `kl`,
        `clip_ratio/region_mean`.
        """
        assert batch.old_logprobs is not None
        assert batch.advantages is not None
        mask = batch.loss_mask
        inputs = PolicyInputs(logprobs_BT, batch.old_logprobs, batch.advantages, mask, *self.clip)
        losses, held = self.policy_loss(inputs)
        stats: Statistics = {"clip_ratio/region_mean": mean_over(held * mask, totals.tokens)}
        if self.correct is not None:
            weights = self.correct(batch.old_logprobs, batch.engine_logprobs, mask, self.cap)
            losses = losses * weights
            stats[RATIO_MEAN] = mean_over(weights * mask, totals.tokens)
            stats[RATIO_MAX] = (weights * mask).max()
        loss = self.reduce(losses, mask, totals)
        if self.kl_coef is not None:
            assert batch.ref_logprobs is not None
            kl = self.kl(logprobs_BT, batch.ref_logprobs)
            loss = loss + self.kl_coef * self.reduce(kl, mask, totals)
            stats["kl"] = mean_over(kl * mask, totals.tokens)
        stats["loss"] = loss.detach().double()
        return loss, stats
