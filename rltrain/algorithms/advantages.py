"""Advantage estimators: token-level rewards of a batch -> one advantage per token, and the rewards
they start from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

STD_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Returns:
    """What an estimator is given; rows `g*G .. g*G+G-1` are samples of one prompt.

    Shapes: `rewards_BT`, `mask_BT` (1 on completion tokens) and the critic's `values_BT` are `[B,
    T]`, B = P*G.
    """

    rewards_BT: torch.Tensor
    mask_BT: torch.Tensor
    group: int
    values_BT: torch.Tensor | None
    gamma: float
    lambd: float
    norm_by_std: bool


AdvantageFunction = Callable[[Returns], torch.Tensor]


def token_rewards(
    scores_B: torch.Tensor, mask_BT: torch.Tensor, kl_BT: torch.Tensor | None, coef: float
) -> torch.Tensor:
    """Each completion's score on its last token, minus `coef` * KL on every token; `[B]`, `[B, T]`
    -> `[B, T]`.

    Ouyang et al. 2022, eq. 2, token by token. A row without tokens has no place for its score.
    """
    real = mask_BT > 0
    last = real & (real.flip(1).cumsum(1).flip(1) == 1)
    rewards = torch.where(last, scores_B.unsqueeze(1), 0.0)
    return rewards if kl_BT is None else rewards - coef * torch.where(real, kl_BT, 0.0)


def whiten(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Shifted and scaled to mean 0 and standard deviation 1 over the real tokens, zero elsewhere;
    `[B, T]`.

    Equal values become zeros.
    """
    real = mask_BT > 0
    if not real.any():
        return torch.zeros_like(values_BT)
    # In double precision equal values have their own mean exactly: no rounding noise is scaled up.
    tokens = values_BT[real].double()
    whitened = (tokens - tokens.mean()) / (tokens.std(correction=0) + STD_EPS)
    return torch.zeros_like(values_BT).masked_scatter(real, whitened.to(values_BT.dtype))


def grpo(returns: Returns) -> torch.Tensor:
    """Group-relative advantage (r - mean) / (std + eps), unbiased std; `[B, T]`. DeepSeekMath, eq.
    3 and section 4.1.2.

    Without `norm_by_std`, r - mean (Dr. GRPO, Liu et al. 2025). A group of one, or of equal
    rewards, carries no signal: its advantages are zero.
    """
    scores_PG = _group_scores(returns)
    centred = scores_PG - scores_PG.mean(dim=1, keepdim=True)
    if returns.norm_by_std and returns.group > 1:
        centred = centred / (scores_PG.std(dim=1, keepdim=True) + STD_EPS)
    return _spread(centred, returns)


def rloo(returns: Returns) -> torch.Tensor:
    """Leave-one-out advantage: r minus the mean of the group's others; `[B, T]`. RLOO, Ahmadian et
    al. 2024.

    A group of one has no others: its advantage is zero.
    """
    scores_PG = _group_scores(returns)
    centred = scores_PG - scores_PG.mean(dim=1, keepdim=True)
    # r - (sum - r) / (G-1) = (r - mean) * G / (G-1)
    return _spread(centred * returns.group / max(1, returns.group - 1), returns)


def reinforce_plus_plus(returns: Returns) -> torch.Tensor:
    """Discounted rewards to go, whitened over the batch's tokens; `[B, T]`. REINFORCE++,
    Hu 2025.
    """
    no_values = torch.zeros_like(returns.rewards_BT)
    return whiten(_gae(returns, no_values, lambd=1.0), returns.mask_BT)


def gae(returns: Returns) -> torch.Tensor:
    """Generalized advantage estimate, whitened over the batch's tokens; `[B, T]`. Schulman et al.
    2015, eq. 16.
    """
    assert returns.values_BT is not None
    return whiten(_gae(returns, returns.values_BT, returns.lambd), returns.mask_BT)


def gae_returns(returns: Returns) -> torch.Tensor:
    """The critic's targets: advantages as estimated, not whitened, plus values; `[B, T]`, zero
    where mask is 0.
    """
    assert returns.values_BT is not None
    advantages = _gae(returns, returns.values_BT, returns.lambd)
    return torch.where(returns.mask_BT > 0, advantages + returns.values_BT, 0.0)


def _group_scores(returns: Returns) -> torch.Tensor:
    """Each sequence's sum of token rewards, by group; `[P, G]`, double, in which equal scores equal
    their mean.
    """
    rewards = torch.where(returns.mask_BT > 0, returns.rewards_BT, 0.0)
    return rewards.double().sum(dim=1).view(-1, returns.group)


def _spread(advantages_PG: torch.Tensor, returns: Returns) -> torch.Tensor:
    """Each sample's advantage on all its tokens; `[P, G]` -> `[B, T]`."""
    advantages = advantages_PG.to(returns.rewards_BT.dtype).view(-1, 1)
    return torch.where(returns.mask_BT > 0, advantages, 0.0)


def _gae(returns: Returns, values_BT: torch.Tensor, lambd: float) -> torch.Tensor:
    """The recursion A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, over
    real tokens.
    """
    real_BT = returns.mask_BT > 0
    estimates = torch.zeros_like(values_BT)
    following = next_value = torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        real, value = real_BT[:, t], values_BT[:, t]
        delta = returns.rewards_BT[:, t] + returns.gamma * next_value - value
        following = torch.where(real, delta + returns.gamma * lambd * following, following)
        next_value = torch.where(real, value, next_value)
        estimates[:, t] = torch.where(real, following, 0.0)
    return estimates


ADVANTAGES: dict[str, AdvantageFunction] = {
    "grpo": grpo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "gae": gae,
}
