"""Losses, importance weights, KL estimators and reductions: pure functions of `[B, T]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """Inputs of a policy loss: log-probabilities now and when sampled, advantages, mask; bounds."""

    logprobs_BT: torch.Tensor
    old_BT: torch.Tensor
    advantages_BT: torch.Tensor
    mask_BT: torch.Tensor
    clip_low: float
    clip_high: float
    clip_c: float


# Returns each token's loss, and which tokens lose their gradient to clipping (cispo: part of it).
PolicyLossFunction = Callable[[PolicyInputs], tuple[torch.Tensor, torch.Tensor]]


def regular(inputs: PolicyInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's clipped surrogate per token, and which tokens are clipped; `[B, T]` each.

    Schulman et al. 2017, eq. 7.
    """
    return _clipped_surrogate(torch.exp(_log_ratio(inputs)), inputs)


def dual_clip(inputs: PolicyInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `regular`, bounded by -c A where the advantage is negative; `[B, T]` each.

    Dual-clip PPO (Ye et al. 2020).
    """
    ratio = torch.exp(_log_ratio(inputs))
    loss, held = _clipped_surrogate(ratio, inputs)
    advantages = _on_tokens(inputs.advantages_BT, inputs)
    bounded = torch.where(advantages < 0, torch.minimum(loss, -inputs.clip_c * advantages), loss)
    return bounded, held | ((ratio > inputs.clip_c) & (advantages < 0))


def gspo(inputs: PolicyInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the clipped surrogate with the sequence's ratio, exp(mean log-ratio); `[B, T]` each.

    GSPO-token (Zheng et al. 2025, eq. 13 and 14): a token's ratio has the sequence's value and the
    token's gradient. With one advantage per sequence it equals GSPO (eq. 5), in value and gradient.
    """
    log_ratio = _log_ratio(inputs)
    lengths = inputs.mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    sequence = (log_ratio.sum(dim=1, keepdim=True) / lengths).detach()
    return _clipped_surrogate(torch.exp(sequence + log_ratio - log_ratio.detach()), inputs)


def cispo(inputs: PolicyInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -sg(min(ratio, 1 + clip_high)) A log p, and which tokens are clipped; `[B, T]` each.

    Every token keeps a gradient (MiniMax-M1, eq. 4 and 5).
    """
    ratio = torch.exp(_log_ratio(inputs)).detach()
    advantages = _on_tokens(inputs.advantages_BT, inputs)
    bound = 1 + inputs.clip_high
    loss = -ratio.clamp(max=bound) * advantages * _on_tokens(inputs.logprobs_BT, inputs)
    return loss, (ratio > bound) & (advantages != 0)


def _on_tokens(values_BT: torch.Tensor, inputs: PolicyInputs) -> torch.Tensor:
    """Set padding to zero: it has neither a value nor a gradient."""
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
    # Dr. GRPO (Liu et al. 2025) differs in the reduction and in the advantages only.
    "dr_grpo": regular,
}


def value_loss(
    values_BT: torch.Tensor, old_values_BT: torch.Tensor, returns_BT: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 0.5 max((V - R)^2, (V_clipped - R)^2), and which tokens are clipped; `[B, T]` each.

    V_clipped is at most `clip` from the old value. Schulman et al. 2017, as implemented in OpenAI's
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
    """Return min(p_trainer / p_engine, cap) per token; `[B, T]`, no gradient, 0 where masked.

    Truncated importance sampling; Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training".
    """
    log_ratio = torch.where(mask_BT > 0, old_BT - engine_BT, 0.0)
    return log_ratio.exp().clamp(max=cap) * (mask_BT > 0)


@torch.no_grad()
def tis_sequence(
    old_BT: torch.Tensor, engine_BT: torch.Tensor, mask_BT: torch.Tensor, cap: float
) -> torch.Tensor:
    """Return min(prod_t p_trainer / p_engine, cap) on each token of a sequence; see `tis_token`."""
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
    """q/p - 1 - log(q/p): unbiased, never negative. Same source; DeepSeekMath, eq. 4."""
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
    """Divisors of a loss, of the whole mini-batch: the losses of its micro-batches add up."""

    tokens: int
    sequences: int
    max_length: int


def token_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, totals: Totals) -> torch.Tensor:
    """Average over the tokens of the mini-batch (DAPO, eq. 8)."""
    return (values_BT * mask_BT).sum() / totals.tokens


def sequence_mean(values_BT: torch.Tensor, mask_BT: torch.Tensor, totals: Totals) -> torch.Tensor:
    """Average over a sequence's tokens, then over sequences (DeepSeekMath, eq. 3)."""
    lengths = mask_BT.sum(dim=1).clamp(min=1)
    return ((values_BT * mask_BT).sum(dim=1) / lengths).sum() / totals.sequences


def seq_mean_token_sum_norm(
    values_BT: torch.Tensor, mask_BT: torch.Tensor, totals: Totals
) -> torch.Tensor:
    """Divide token sums by the length limit: no length bias (Dr. GRPO, Liu et al. 2025)."""
    return (values_BT * mask_BT).sum() / (totals.max_length * totals.sequences)


REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, Totals], torch.Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "seq_mean_token_sum_norm": seq_mean_token_sum_norm,
}
