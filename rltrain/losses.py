"""Policy losses, KL estimators and reductions: registries of small pure functions over `[B, T]` tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

PolicyLossFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float, float], tuple[torch.Tensor, torch.Tensor]
]


def regular(
    logprobs_BT: torch.Tensor, old_BT: torch.Tensor, advantages_B: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped surrogate per token, and where the clip holds; `[B, T]` both. Schulman et al. 2017, eq. 7."""
    ratio = torch.exp(logprobs_BT - old_BT)
    advantages = advantages_B.unsqueeze(1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    held = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
    return loss, held


POLICY_LOSSES: dict[str, PolicyLossFunction] = {"regular": regular}


def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log p - log q: unbiased, high variance. Schulman, "Approximating KL divergence"."""
    return logprobs - reference


def k2(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(log p - log q)^2 / 2: biased, low variance, its gradient is the KL's. Same source."""
    return 0.5 * (logprobs - reference).square()


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """q/p - 1 - log(q/p): unbiased, never negative. Same source; GRPO's choice (DeepSeekMath, eq. 4)."""
    log_ratio = reference - logprobs
    return torch.exp(log_ratio) - 1 - log_ratio


def absolute(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|log p - log q|."""
    return (logprobs - reference).abs()


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "k1": k1, "k2": k2, "k3": k3, "abs": absolute,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Totals:
    """What a mini-batch's loss is divided by; taken over the whole mini-batch, so that micro-batches only add up."""

    tokens: int
    sequences: int
    max_length: int


def token_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, totals: Totals) -> torch.Tensor:
    """Every token of the mini-batch weighs the same (DAPO, eq. 8)."""
    return (values_BT * mask_BT).sum() / totals.tokens


def sequence_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, totals: Totals) -> torch.Tensor:
    """Every sequence weighs the same: mean over its tokens, then over sequences (DeepSeekMath, eq. 3)."""
    lengths = mask_BT.sum(dim=1).clamp(min=1)
    return ((values_BT * mask_BT).sum(dim=1) / lengths).sum() / totals.sequences


def seq_mean_token_sum_norm(values_BT: torch.Tensor, mask_BT: torch.Tensor, totals: Totals) -> torch.Tensor:
    """Token sums over a constant, the length limit: no length bias (Dr. GRPO, Liu et al. 2025)."""
    return (values_BT * mask_BT).sum() / (totals.max_length * totals.sequences)


REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, Totals], torch.Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm,
}
