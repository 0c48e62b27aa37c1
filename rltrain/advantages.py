"""Advantage estimators: rewards of a batch's groups -> one advantage per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch

AdvantageFunction = Callable[[torch.Tensor], torch.Tensor]

STD_EPS = 1e-6


def grpo(rewards_PG: torch.Tensor) -> torch.Tensor:
    """Group-relative advantage (r - mean) / (std + eps), unbiased std; `[P, G]` -> `[P, G]`. DeepSeekMath, eq. 3.

    A group of one, or of equal rewards, carries no signal: its advantages are zero.
    """
    if rewards_PG.shape[1] == 1:
        return torch.zeros_like(rewards_PG)
    centred = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    std = rewards_PG.std(dim=1, keepdim=True)
    return torch.where(std > 0, centred / (std + STD_EPS), torch.zeros_like(centred))


ADVANTAGES: dict[str, AdvantageFunction] = {"grpo": grpo}
