"""Batches: a member's samples as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch


@dataclass(slots=True)
class Batch:
    """One member's samples: prompts left-padded `[B, P]`, completions right-padded `[B, T]`.

    It stays on the CPU, where cutting and packing need no synchronisation with the GPU;
    micro-batches are moved. `mask` is 1 on completion tokens, `loss_mask` on those that are trained
    on. Log-probabilities, values, returns and advantages are `[B, T]`, or None where they are not
    computed.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    mask: torch.Tensor
    loss_mask: torch.Tensor
    engine_logprobs: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    advantages: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def attention_mask(self) -> torch.Tensor:
        """1 on every real token, `[B, P + T]`."""
        return torch.cat([self.prompt_mask, self.mask.long()], dim=1)

    @property
    def position_ids(self) -> torch.Tensor:
        """Positions, counted from the first real token, `[B, P + T]`."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def tokens(self) -> int:
        """Number of completion tokens that are trained on."""
        return int(self.loss_mask.sum())

    @property
    def packed_tokens(self) -> int:
        """Number of tokens that a forward pass computes: equal prompts count once."""
        lengths = dict(zip(prompt_numbers(self), self.prompt_mask.sum(dim=1).tolist(), strict=True))
        return sum(lengths.values()) + int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            moved[item.name] = None if value is None else to_device(value, device)
        return Batch(**moved)

    def take(self, rows: Sequence[int]) -> Batch:
        """Return some of the sequences, without padding that only the others needed."""
        index = torch.tensor(rows)
        width_p = int(self.prompt_mask[index].sum(dim=1).max())
        width_t = max(1, int(self.mask[index].sum(dim=1).max()))
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None:
                value = value[index]
                value = (
                    value[:, -width_p:]
                    if item.name in ("prompt_ids", "prompt_mask")
                    else value[:, :width_t]
                )
            values[item.name] = value
        return Batch(**values)

    def untrained(self) -> Batch:
        """Return the same sequences with an empty `loss_mask`, for a rank that has none left."""
        blank = self.take(range(len(self)))
        blank.loss_mask = torch.zeros_like(blank.loss_mask)
        return blank


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    engine_logprobs: Sequence[Sequence[float]],
    *,
    pad_id: int,
) -> Batch:
    """Return a Batch of B samples' token ids and the engine's log-probabilities."""
    prompt_width = max(len(p) for p in prompts)
    width = max(1, max(len(c) for c in completions))
    count = len(prompts)
    prompt_ids = torch.full((count, prompt_width), pad_id)
    prompt_mask = torch.zeros((count, prompt_width), dtype=torch.long)
    completion_ids = torch.full((count, width), pad_id)
    mask = torch.zeros((count, width))
    logprobs = torch.zeros((count, width))
    for row, (prompt, completion, values) in enumerate(
        zip(prompts, completions, engine_logprobs, strict=True)
    ):
        prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
        prompt_mask[row, prompt_width - len(prompt) :] = 1
        completion_ids[row, : len(completion)] = torch.tensor(completion, dtype=torch.long)
        mask[row, : len(completion)] = 1
        logprobs[row, : len(completion)] = torch.tensor(values)
    return Batch(prompt_ids, prompt_mask, completion_ids, mask, mask.clone(), logprobs)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; to a GPU asynchronously, through pinned memory."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def prompt_numbers(batch: Batch) -> list[int]:
    """Return a number for each sequence's prompt; equal prompts have equal numbers."""
    numbers: dict[bytes, int] = {}
    both = np.stack([batch.prompt_ids.numpy(), batch.prompt_mask.numpy()], axis=1)
    return [numbers.setdefault(row.tobytes(), len(numbers)) for row in both]
