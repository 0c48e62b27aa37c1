"""Token sampling by inversion of the distribution, with each row's own uniform numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from harness.config.schema import Sampling


class TokenSampler:
    """Samples tokens: transformers' logits warpers in vLLM's order, then inversion."""

    def __init__(self, sampling: Sampling) -> None:
        self._greedy = sampling.temperature == 0
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            if sampling.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k > 0:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def sample(
        self, logits_NV: torch.Tensor, uniform_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and their log-probabilities, each `[N]`, float32.

        The token is the first whose cumulative probability exceeds `uniform_N`, in [0, 1) (inverse
        transform sampling).
        """
        # These warpers ignore the token ids, their first argument.
        scores_NV = self._warpers(logits_NV, logits_NV.float())
        probs_NV = scores_NV.softmax(dim=-1)
        if self._greedy:
            token_N1 = scores_NV.argmax(dim=-1, keepdim=True)
        else:
            cumulative_NV = probs_NV.cumsum(dim=-1)
            total_N1 = cumulative_NV[:, -1:]
            # In float32 the product may round up to the total: keep it below.
            target_N1 = torch.minimum(
                uniform_N[:, None] * total_N1, total_N1.nextafter(torch.zeros_like(total_N1))
            )
            token_N1 = torch.searchsorted(cumulative_NV, target_N1, right=True)
        return token_N1.squeeze(-1), probs_NV.gather(-1, token_N1).squeeze(-1).log()


def uniform_numbers(seeds: Sequence[int], steps: int, device: torch.device) -> torch.Tensor:
    """Return uniform numbers `[N, steps]` in [0, 1), float32.

    A row depends on its seed alone; fewer steps give the first numbers of more.
    """
    generator = torch.Generator()
    numbers = torch.empty(len(seeds), steps)
    for row, seed in zip(numbers, seeds, strict=True):
        torch.rand(steps, generator=generator.manual_seed(seed), out=row)
    return numbers.to(device)
