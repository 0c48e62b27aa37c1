"""From rewards to advantages: which tokens train, and how good each was."""

from __future__ import annotations

import torch

from harness.config.schema import PolicyLoss, Recipe
from rltrain.algorithms.advantages import ADVANTAGES, Returns, gae_returns, token_rewards
from rltrain.algorithms.losses import KL_ESTIMATORS
from rltrain.data.batch import Batch


class Credit:
    """Loss mask, token rewards, advantages and value targets of one member, bound to its recipe's
    settings.
    """

    def __init__(self, recipe: Recipe) -> None:
        algorithm = recipe.trainer.algorithm
        self._estimate = ADVANTAGES[algorithm.advantage_estimator.name]
        self._norm_by_std = (
            algorithm.grpo_norm_by_std and algorithm.policy_loss_type is not PolicyLoss.dr_grpo
        )
        self._gamma, self._lambd = algorithm.gamma, algorithm.lambd
        self._kl = (
            KL_ESTIMATORS[algorithm.kl_estimator.name] if algorithm.use_kl_in_reward else None
        )
        self._kl_coef = algorithm.kl_loss_coef
        self._mask_overlong = recipe.generator.apply_overlong_filtering
        self._mask_equal = algorithm.zero_variance_filter

    def __call__(
        self, batch: Batch, rewards_PG: torch.Tensor, cut_B: torch.Tensor
    ) -> dict[str, float]:
        """Set the batch's loss mask, advantages and, with a critic, returns; metrics. `cut_B`:
        ended by the limit.
        """
        stats = self._mask(batch, rewards_PG, cut_B)
        kl = None
        if self._kl is not None:
            assert batch.old_logprobs is not None
            assert batch.ref_logprobs is not None
            kl = self._kl(batch.old_logprobs, batch.ref_logprobs)
            stats["kl_in_reward"] = float((kl * batch.mask).sum() / batch.mask.sum())
        given = Returns(
            rewards_BT=token_rewards(
                rewards_PG.flatten().to(batch.mask.device), batch.mask, kl, self._kl_coef
            ),
            mask_BT=batch.mask,
            group=rewards_PG.shape[1],
            values_BT=batch.values,
            gamma=self._gamma,
            lambd=self._lambd,
            norm_by_std=self._norm_by_std,
        )
        batch.advantages = self._estimate(given)
        if batch.values is not None:
            batch.returns = gae_returns(given)
            stats |= _critic_statistics(batch.values, batch.returns, batch.mask)
        return stats

    def _mask(
        self, batch: Batch, rewards_PG: torch.Tensor, cut_B: torch.Tensor
    ) -> dict[str, float]:
        """Leave out completions that the limit cut, and groups whose rewards are all equal, as far
        as wanted.
        """
        if not (self._mask_overlong or self._mask_equal):
            return {}
        out = cut_B & self._mask_overlong
        if self._mask_equal:
            equal_P = (rewards_PG == rewards_PG[:, :1]).all(dim=1)
            out = out | equal_P.repeat_interleave(rewards_PG.shape[1])
        batch.loss_mask = batch.mask * ~out.to(batch.mask.device).unsqueeze(1)
        return {"frac_masked_completions": float(out.float().mean())}


def _critic_statistics(
    values_BT: torch.Tensor, returns_BT: torch.Tensor, mask_BT: torch.Tensor
) -> dict[str, float]:
    """Means over tokens, and the share of the returns' variance that the values explain, 1 - Var(R
    - V) / Var(R).
    """
    real = mask_BT.bool()
    values, returns = values_BT[real], returns_BT[real]
    variance = float(returns.var(correction=0))
    left = float((returns - values).var(correction=0))
    return {
        "critic/mean_value": float(values.mean()),
        "critic/mean_return": float(returns.mean()),
        "critic/explained_variance": 1 - left / variance if variance > 0 else 0.0,
    }
