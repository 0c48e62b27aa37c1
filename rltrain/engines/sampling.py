"""Drawing tokens: each row with uniform numbers of its own, by inversion of its distribution."""

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


class Drawing:
    """How tokens are drawn under one `Sampling`: transformers' own warpers in vLLM's order, then
    the draw.
    """

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

    def draw(
        self, logits_NV: torch.Tensor, uniform_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their log-probabilities, each `[N]`, float32; `uniform_N` in [0, 1) decides.

        The token is the first whose cumulative probability exceeds the uniform number (inverse
        transform sampling).
        """
        scores_NV = self._warpers(
            logits_NV, logits_NV.float()
        )  # these warpers never look at the ids
        probs_NV = scores_NV.softmax(dim=-1)
        if self._greedy:
            token_N1 = scores_NV.argmax(dim=-1, keepdim=True)
        else:
            cumulative_NV = probs_NV.cumsum(dim=-1)
            total_N1 = cumulative_NV[:, -1:]
            # Below the total in float32 too, where the product may round up to it.
            target_N1 = torch.minimum(
                uniform_N[:, None] * total_N1, total_N1.nextafter(torch.zeros_like(total_N1))
            )
            token_N1 = torch.searchsorted(cumulative_NV, target_N1, right=True)
        return token_N1.squeeze(-1), probs_NV.gather(-1, token_N1).squeeze(-1).log()


def uniform_numbers(seeds: Sequence[int], steps: int, device: torch.device) -> torch.Tensor:
    """`[N, steps]` in [0, 1), float32: a row depends on its seed alone, and fewer steps are the
    first of more.
    """
    generator = torch.Generator()
    numbers = torch.empty(len(seeds), steps)
    for row, seed in zip(numbers, seeds, strict=True):
        torch.rand(steps, generator=generator.manual_seed(seed), out=row)
    return numbers.to(device)
