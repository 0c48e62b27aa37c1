"""Samples to tensors, and batches into mini- and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(slots=True)
class Batch:
    """One member's samples as tensors: prompts left-padded `[B, P]`, completions right-padded `[B, T]`.

    `mask` is 1 on completion tokens; `engine_logprobs`, `old_logprobs` and `ref_logprobs` are `[B, T]`,
    `advantages` `[B]`; those not computed yet, or not needed, are None.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    mask: torch.Tensor
    engine_logprobs: torch.Tensor
    advantages: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def attention_mask(self) -> torch.Tensor:
        """1 on every real token, `[B, P + T]`."""
        return torch.cat([self.prompt_mask, self.mask.long()], dim=1)

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions counted from the first real token, `[B, P + T]`."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return int(self.mask.sum())

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the sequences, without the padding that only the others needed."""
        width_p = int(self.prompt_mask[start:stop].sum(dim=1).max())
        width_t = max(1, int(self.mask[start:stop].sum(dim=1).max()))
        prompt = {"prompt_ids", "prompt_mask"}
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None or value.dim() == 1:
                values[item.name] = value if value is None else value[start:stop]
            elif item.name in prompt:
                values[item.name] = value[start:stop, -width_p:]
            else:
                values[item.name] = value[start:stop, :width_t]
        return Batch(**values)

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive parts of at most `size` sequences."""
        for start in range(0, len(self), size):
            yield self.rows(start, min(start + size, len(self)))


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    engine_logprobs: Sequence[Sequence[float]],
    *,
    pad_id: int,
    device: torch.device,
) -> Batch:
    """Token ids of B samples and the engine's log-probabilities of their completions -> a Batch."""
    prompt_width = max(len(p) for p in prompts)
    width = max(1, max(len(c) for c in completions))
    count = len(prompts)
    prompt_ids = torch.full((count, prompt_width), pad_id)
    prompt_mask = torch.zeros((count, prompt_width), dtype=torch.long)
    completion_ids = torch.full((count, width), pad_id)
    mask = torch.zeros((count, width))
    logprobs = torch.zeros((count, width))
    for row, (prompt, completion, values) in enumerate(zip(prompts, completions, engine_logprobs, strict=True)):
        prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        prompt_mask[row, prompt_width - len(prompt) :] = 1
        completion_ids[row, : len(completion)] = torch.tensor(completion, dtype=torch.long)
        mask[row, : len(completion)] = 1
        logprobs[row, : len(completion)] = torch.tensor(values)
    return Batch(*(t.to(device) for t in (prompt_ids, prompt_mask, completion_ids, mask, logprobs)))
