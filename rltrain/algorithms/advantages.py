"""Advantages: from a batch's rewards to one advantage per completion token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness.config.schema import PolicyLoss, Recipe
from rltrain.algorithms.losses import KL_ESTIMATORS
from rltrain.data.batch import Batch

STD_EPS = 1e-6


def compute_advantages(
    recipe: Recipe, batch: Batch, rewards_PG: torch.Tensor, truncated_B: torch.Tensor
) -> dict[str, float]:
    """Set the loss mask, the advantages and, with a critic, the returns of a batch.

    Args:
        recipe: its `trainer.algorithm` chooses the estimator, the filters and the KL penalty.
        batch: `[B, T]`, B = P * G, with old and reference log-probabilities where the rewards hold
            a KL penalty, and with values where there is a critic.
        rewards_PG: one reward per completion, `[P, G]`.
        truncated_B: whether the length limit ended a completion, `[B]`.

    Returns:
        The metrics of what was masked, of the KL penalty and of the critic.
    """
    algorithm = recipe.trainer.algorithm
    row: dict[str, float] = {}
    if recipe.generator.apply_overlong_filtering or algorithm.zero_variance_filter:
        masked_B = truncated_B & recipe.generator.apply_overlong_filtering
        if algorithm.zero_variance_filter:
            equal_P = (rewards_PG == rewards_PG[:, :1]).all(dim=1)
            masked_B = masked_B | equal_P.repeat_interleave(rewards_PG.shape[1])
        batch.loss_mask = batch.mask * ~masked_B.to(batch.mask.device).unsqueeze(1)
        row["frac_masked_completions"] = float(masked_B.float().mean())
    kl_BT = None
    if algorithm.use_kl_in_reward:
        assert batch.old_logprobs is not None
        assert batch.ref_logprobs is not None
        estimate_kl = KL_ESTIMATORS[algorithm.kl_estimator.name]
        kl_BT = estimate_kl(batch.old_logprobs, batch.ref_logprobs)
        row["kl_in_reward"] = float((kl_BT * batch.mask).sum() / batch.mask.sum())
    scores_B = rewards_PG.flatten().to(batch.mask.device)
    dr_grpo = algorithm.policy_loss_type is PolicyLoss.dr_grpo
    inputs = AdvantageInputs(
        rewards_BT=token_rewards(scores_B, batch.mask, kl_BT, algorithm.kl_loss_coef),
        mask_BT=batch.mask,
        group=rewards_PG.shape[1],
        values_BT=batch.values,
        gamma=algorithm.gamma,
        lambd=algorithm.lambd,
        norm_by_std=algorithm.grpo_norm_by_std and not dr_grpo,
    )
    batch.advantages = ADVANTAGES[algorithm.advantage_estimator.name](inputs)
    if batch.values is not None:
        batch.returns = gae_returns(inputs)
        row |= _critic_metrics(batch.values, batch.returns, batch.mask)
    return row


def _critic_metrics(
    values_BT: torch.Tensor, returns_BT: torch.Tensor, mask_BT: torch.Tensor
) -> dict[str, float]:
    """Return means over tokens, and the explained variance 1 - Var(R - V) / Var(R)."""
    real = mask_BT.bool()
    values, returns = values_BT[real], returns_BT[real]
    variance = float(returns.var(correction=0))
    unexplained = float((returns - values).var(correction=0))
    return {
        "critic/mean_value": float(values.mean()),
        "critic/mean_return": float(returns.mean()),
        "critic/explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
    }


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """Inputs of an advantage estimator; rows `p*G .. p*G+G-1` are the samples of prompt `p`.

    `rewards_BT`, `mask_BT` (1 on completion tokens) and the critic's `values_BT` are `[B, T]`,
    B = P * G.
    """

    rewards_BT: torch.Tensor
    mask_BT: torch.Tensor
    group: int
    values_BT: torch.Tensor | None
    gamma: float
    lambd: float
    norm_by_std: bool


AdvantageFunction = Callable[[AdvantageInputs], torch.Tensor]


def token_rewards(
    scores_B: torch.Tensor, mask_BT: torch.Tensor, kl_BT: torch.Tensor | None, coef: float
) -> torch.Tensor:
    """Return token rewards `[B, T]`: the score on the last token, minus `coef` * KL on every token.

    Ouyang et al. 2022, eq. 2, per token. The score `[B]` of a row without tokens is dropped.
    """
    real = mask_BT > 0
    last = real & (real.flip(1).cumsum(1).flip(1) == 1)
    rewards = torch.where(last, scores_B.unsqueeze(1), 0.0)
    return rewards if kl_BT is None else rewards - coef * torch.where(real, kl_BT, 0.0)


def whiten(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Scale to mean 0 and standard deviation 1 over the real tokens, zero elsewhere; `[B, T]`.

    Equal values become zeros.
    """
    real = mask_BT > 0
    if not real.any():
        return torch.zeros_like(values_BT)
    # In double precision equal values have their own mean exactly: no rounding noise is scaled up.
    tokens = values_BT[real].double()
    whitened = (tokens - tokens.mean()) / (tokens.std(correction=0) + STD_EPS)
    return torch.zeros_like(values_BT).masked_scatter(real, whitened.to(values_BT.dtype))


def grpo(inputs: AdvantageInputs) -> torch.Tensor:
    """Return the group-relative advantage (r - mean) / (std + eps), unbiased std; `[B, T]`.

    DeepSeekMath (Shao et al. 2024), eq. 3 and section 4.1.2. Without `norm_by_std`, r - mean
    (Dr. GRPO, Liu et al. 2025). A group of one, or of equal rewards, has advantages of zero.
    """
    scores_PG = _group_scores(inputs)
    centred = scores_PG - scores_PG.mean(dim=1, keepdim=True)
    if inputs.norm_by_std and inputs.group > 1:
        centred = centred / (scores_PG.std(dim=1, keepdim=True) + STD_EPS)
    return _on_all_tokens(centred, inputs)


def rloo(inputs: AdvantageInputs) -> torch.Tensor:
    """Return the leave-one-out advantage: r minus the mean of the group's others; `[B, T]`.

    RLOO (Ahmadian et al. 2024). The advantage of a group of one is zero.
    """
    scores_PG = _group_scores(inputs)
    centred = scores_PG - scores_PG.mean(dim=1, keepdim=True)
    # r - (sum - r) / (G-1) = (r - mean) * G / (G-1)
    return _on_all_tokens(centred * inputs.group / max(1, inputs.group - 1), inputs)


def reinforce_plus_plus(inputs: AdvantageInputs) -> torch.Tensor:
    """Return discounted rewards-to-go, whitened over the batch's tokens; `[B, T]`.

    REINFORCE++ (Hu 2025).
    """
    no_values = torch.zeros_like(inputs.rewards_BT)
    return whiten(_gae(inputs, no_values, lambd=1.0), inputs.mask_BT)


def gae(inputs: AdvantageInputs) -> torch.Tensor:
    """Return the generalized advantage estimate, whitened over the batch's tokens; `[B, T]`.

    Schulman et al. 2015, eq. 16.
    """
    assert inputs.values_BT is not None
    return whiten(_gae(inputs, inputs.values_BT, inputs.lambd), inputs.mask_BT)


def gae_returns(inputs: AdvantageInputs) -> torch.Tensor:
    """Return the critic's targets: unwhitened advantages plus values; `[B, T]`, 0 where masked."""
    assert inputs.values_BT is not None
    advantages = _gae(inputs, inputs.values_BT, inputs.lambd)
    return torch.where(inputs.mask_BT > 0, advantages + inputs.values_BT, 0.0)


def _group_scores(inputs: AdvantageInputs) -> torch.Tensor:
    """Sum each sequence's token rewards; `[P, G]`, double, where equal scores equal their mean."""
    rewards = torch.where(inputs.mask_BT > 0, inputs.rewards_BT, 0.0)
    return rewards.double().sum(dim=1).view(-1, inputs.group)


def _on_all_tokens(advantages_PG: torch.Tensor, inputs: AdvantageInputs) -> torch.Tensor:
    """Repeat each sample's advantage on all its tokens; `[P, G]` -> `[B, T]`."""
    advantages = advantages_PG.to(inputs.rewards_BT.dtype).view(-1, 1)
    return torch.where(inputs.mask_BT > 0, advantages, 0.0)


def _gae(inputs: AdvantageInputs, values_BT: torch.Tensor, lambd: float) -> torch.Tensor:
    """Compute A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t."""
    real_BT = inputs.mask_BT > 0
    estimates = torch.zeros_like(values_BT)
    following = next_value = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        real, value = real_BT[:, t], values_BT[:, t]
        delta = inputs.rewards_BT[:, t] + inputs.gamma * next_value - value
        following = torch.where(real, delta + inputs.gamma * lambd * following, following)
        next_value = torch.where(real, value, next_value)
        estimates[:, t] = torch.where(real, following, 0.0)
    return estimates


ADVANTAGES: dict[str, AdvantageFunction] = {
    "grpo": grpo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "gae": gae,
}
