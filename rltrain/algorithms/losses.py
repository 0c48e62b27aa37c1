"""Losses, importance weights, KL estimators, reductions: registries of small pure functions over
`[B, T]` tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """What a policy loss is given: log-probabilities now and when sampled, advantages and mask `[B,
    T]`, and bounds.
    """

    logprobs_BT: torch.Tensor
    old_BT: torch.Tensor
    advantages_BT: torch.Tensor
    mask_BT: torch.Tensor
    clip_low: float
    clip_high: float
    clip_c: float


# -> the loss of each token, and where clipping takes the token's gradient away (cispo: shrinks it);
# `[B, T]` both.
PolicyLossFunction = Callable[[PolicyInputs], tuple[torch.Tensor, torch.Tensor]]


def regular(inputs: PolicyInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate per token, and where the clip holds; `[B, T]` both. Schulman et al.
    2017, eq. 7.
    """
    return _clipped_surrogate(torch.exp(_log_ratio(inputs)), inputs)


def dual_clip(inputs: PolicyInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`regular`, bounded by -c A where the advantage is negative; `[B, T]` both. Ye et al. 2020,
    Dual-clip PPO.
    """
    ratio = torch.exp(_log_ratio(inputs))
    loss, held = _clipped_surrogate(ratio, inputs)
    advantages = _on_tokens(inputs.advantages_BT, inputs)
    bounded = torch.where(advantages < 0, torch.minimum(loss, -inputs.clip_c * advantages), loss)
    return bounded, held | ((ratio > inputs.clip_c) & (advantages < 0))


def gspo(inputs: PolicyInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate with the sequence's ratio, exp(mean log-ratio); `[B, T]` both. GSPO, Zheng
    et al. 2025.

    Eq. 13 and 14, GSPO-token: the value of each token's ratio is the sequence's, its gradient the
    token's own. Where a sequence's tokens share one advantage this is GSPO itself (eq. 5), in value
    and gradient.
    """
    log_ratio = _log_ratio(inputs)
    lengths = inputs.mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    sequence = (log_ratio.sum(dim=1, keepdim=True) / lengths).detach()
    return _clipped_surrogate(torch.exp(sequence + log_ratio - log_ratio.detach()), inputs)


def cispo(inputs: PolicyInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """-sg(min(ratio, 1 + clip_high)) A log p: every token keeps a gradient; `[B, T]` both.
    MiniMax-M1, eq. 4 and 5.
    """
    ratio = torch.exp(_log_ratio(inputs)).detach()
    advantages = _on_tokens(inputs.advantages_BT, inputs)
    bound = 1 + inputs.clip_high
    loss = -ratio.clamp(max=bound) * advantages * _on_tokens(inputs.logprobs_BT, inputs)
    return loss, (ratio > bound) & (advantages != 0)


def _on_tokens(values_BT: torch.Tensor, inputs: PolicyInputs) -> torch.Tensor:
    """Zero where mask is 0, so that padding has neither value nor gradient, whatever
    stands there.
    """
    return torch.where(inputs.mask_BT > 0, values_BT, 0.0)


def _log_ratio(inputs: PolicyInputs) -> torch.Tensor:
    return _on_tokens(inputs.logprobs_BT - inputs.old_BT, inputs)


def _clipped_surrogate(
    ratio: torch.Tensor, inputs: PolicyInputs
) -> tuple[torch.Tensor, torch.Tensor]:
    advantages = _on_tokens(inputs.advantages_BT, inputs)
    low, high = 1 - inputs.clip_low, 1 + inputs.clip_high
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    return loss, ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))


POLICY_LOSSES: dict[str, PolicyLossFunction] = {
    "regular": regular,
    "dual_clip": dual_clip,
    "gspo": gspo,
    "cispo": cispo,
    # Dr. GRPO (Liu et al. 2025) keeps the surrogate: it differs in reduction and in advantages not
    # divided by std.
    "dr_grpo": regular,
}


def value_loss(
    values_BT: torch.Tensor, old_values_BT: torch.Tensor, returns_BT: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """0.5 max((V - R)^2, (V_clipped - R)^2) per token, and where the clip takes the gradient away;
    `[B, T]` both.

    V_clipped is at most `clip` from the old value. Schulman et al. 2017 as implemented in OpenAI's
    baselines (ppo2).
    """
    moved = values_BT - old_values_BT
    clipped = old_values_BT + moved.clamp(-clip, clip)
    free, bounded = (values_BT - returns_BT).square(), (clipped - returns_BT).square()
    return 0.5 * torch.maximum(free, bounded), (moved.abs() > clip) & (bounded > free)


TISFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@torch.no_grad()
def tis_token(
    old_BT: torch.Tensor, engine_BT: torch.Tensor, mask_BT: torch.Tensor, cap: float
) -> torch.Tensor:
    """min(p_trainer / p_engine, cap) per token; `[B, T]`, no gradient, zero where mask is 0.

    Truncated importance sampling; Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training".
    """
    log_ratio = torch.where(mask_BT > 0, old_BT - engine_BT, 0.0)
    return log_ratio.exp().clamp(max=cap) * (mask_BT > 0)


@torch.no_grad()
def tis_sequence(
    old_BT: torch.Tensor, engine_BT: torch.Tensor, mask_BT: torch.Tensor, cap: float
) -> torch.Tensor:
    """min(prod_t p_trainer / p_engine, cap) on each token of a sequence; otherwise as `tis_token`.
    Same source.
    """
    log_ratio = torch.where(mask_BT > 0, old_BT - engine_BT, 0.0)
    return log_ratio.sum(dim=1, keepdim=True).exp().clamp(max=cap) * (mask_BT > 0)


TIS: dict[str, TISFunction] = {"token": tis_token, "sequence": tis_sequence}


def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log p - log q: unbiased, high variance. Schulman, "Approximating KL divergence"."""
    return logprobs - reference


def k2(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(log p - log q)^2 / 2: biased, low variance, its gradient is the KL's. Same source."""
    return 0.5 * (logprobs - reference).square()


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """q/p - 1 - log(q/p): unbiased, never negative. Same source; GRPO's choice (DeepSeekMath, eq.
    4).
    """
    log_ratio = reference - logprobs
    return torch.exp(log_ratio) - 1 - log_ratio


def absolute(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|log p - log q|."""
    return (logprobs - reference).abs()


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
}


@dataclass(frozen=True, slots=True)
class Totals:
    """What a mini-batch's loss is divided by; taken over the whole mini-batch, so that
    micro-batches only add up.
    """

    tokens: int
    sequences: int
    max_length: int


def token_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, totals: Totals) -> torch.Tensor:
    """Every token of the mini-batch weighs the same (DAPO, eq. 8)."""
    return (values_BT * mask_BT).sum() / totals.tokens


def sequence_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, totals: Totals) -> torch.Tensor:
    """Every sequence weighs the same: mean over its tokens, then over sequences (DeepSeekMath, eq.
    3).
    """
    lengths = mask_BT.sum(dim=1).clamp(min=1)
    return ((values_BT * mask_BT).sum(dim=1) / lengths).sum() / totals.sequences


def seq_mean_token_sum_norm(
    values_BT: torch.Tensor, mask_BT: torch.Tensor, totals: Totals
) -> torch.Tensor:
    """Token sums over a constant, the length limit: no length bias (Dr. GRPO, Liu et al. 2025)."""
    return (values_BT * mask_BT).sum() / (totals.max_length * totals.sequences)


REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, Totals], torch.Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm,
}
