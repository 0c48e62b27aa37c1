"""What a member minimises: policy loss plus KL, chosen once from its recipe."""

from __future__ import annotations

import torch

from harness.schema import Recipe
from rltrain.batch import Batch
from rltrain.losses import KL_ESTIMATORS, POLICY_LOSSES, REDUCTIONS, Totals


class Objective:
    """Policy loss, KL term and reduction of one member, bound to its recipe's settings."""

    def __init__(self, recipe: Recipe) -> None:
        algorithm = recipe.trainer.algorithm
        self.policy_loss = POLICY_LOSSES[algorithm.policy_loss_type.name]
        self.kl = KL_ESTIMATORS[algorithm.kl_estimator.name]
        self.kl_coef = algorithm.kl_loss_coef if algorithm.use_kl_loss else 0.0
        self.reduce = REDUCTIONS[algorithm.loss_reduction.name]
        self.clip = (algorithm.eps_clip_low, algorithm.eps_clip_high)
        self.max_length = recipe.generator.sampling_params.max_generate_length

    def totals(self, batch: Batch) -> Totals:
        """The divisors of a mini-batch's loss."""
        return Totals(tokens=max(1, batch.tokens), sequences=len(batch), max_length=self.max_length)

    def __call__(
        self, logprobs_BT: torch.Tensor, batch: Batch, totals: Totals
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """A micro-batch's share of the loss, and of the mini-batch's means `loss`, `kl`, `clip_ratio/region_mean`."""
        assert batch.old_logprobs is not None
        assert batch.advantages is not None
        losses, held = self.policy_loss(logprobs_BT, batch.old_logprobs, batch.advantages, *self.clip)
        loss = self.reduce(losses, batch.mask, totals)
        stats = {"clip_ratio/region_mean": float((held * batch.mask).sum()) / totals.tokens}
        if batch.ref_logprobs is not None:
            kl = self.kl(logprobs_BT, batch.ref_logprobs)
            loss = loss + self.kl_coef * self.reduce(kl, batch.mask, totals)
            stats["kl"] = float((kl.detach() * batch.mask).sum()) / totals.tokens
        stats["loss"] = float(loss.detach())
        return loss, stats
