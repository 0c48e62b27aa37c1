"""Samples to tensors, and batches into mini- and micro-batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from rltrain.distributed.process_group import Ranks


@dataclass(slots=True)
class Batch:
    """One member's samples as tensors: prompts left-padded `[B, P]`, completions right-padded `[B,
    T]`.

    It is kept on the CPU, where batches are cut and packed without a word to the GPU; micro-batches
    are moved. `mask` is 1 on completion tokens, `loss_mask` on those that are trained on;
    log-probabilities, values, returns and advantages are `[B, T]`; those not computed yet, or not
    needed, are None.
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
        """Positions counted from the first real token, `[B, P + T]`."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def tokens(self) -> int:
        """Completion tokens that are trained on."""
        return int(self.loss_mask.sum())

    @property
    def packed_tokens(self) -> int:
        """Tokens that a pass computes: a prompt that several sequences have counts once."""
        lengths = dict(zip(prompt_numbers(self), self.prompt_mask.sum(dim=1).tolist(), strict=True))
        return sum(lengths.values()) + int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            moved[item.name] = None if value is None else to_device(value, device)
        return Batch(**moved)

    def take(self, rows: Sequence[int]) -> Batch:
        """Some of the sequences, without the padding that only the others needed."""
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
        """The same sequences with nothing to train on: what a rank computes that has none left
        while others do.
        """
        blank = self.take(range(len(self)))
        blank.loss_mask = torch.zeros_like(blank.loss_mask)
        return blank


def micro_batches(
    batch: Batch, rows: Sequence[int], size: int | None, tokens: int | None
) -> list[list[int]]:
    """Rows of a batch in order, in groups of at most `size` sequences and `tokens` tokens; None: no
    such bound.

    A prompt that several sequences of a group have counts once, as it is computed once. A sequence
    that is longer than the bound goes alone.
    """
    numbers = prompt_numbers(batch)
    prompts, completions = (
        batch.prompt_mask.sum(dim=1).tolist(),
        batch.mask.sum(dim=1).long().tolist(),
    )
    most_rows, most_tokens = size or math.inf, tokens or math.inf
    groups: list[list[int]] = []
    there: set[int] = set()
    taken = 0
    for row in rows:
        more = completions[row] + (0 if numbers[row] in there else prompts[row])
        if not groups or len(groups[-1]) == most_rows or taken + more > most_tokens:
            groups.append([])
            there, taken, more = set(), 0, completions[row] + prompts[row]
        groups[-1].append(row)
        there.add(numbers[row])
        taken += more
    return groups


def shares(rows: Sequence[int], ranks: int) -> list[list[int]]:
    """Rows in as many runs of neighbours as there are ranks, like in number: samples of a prompt
    stay together.
    """
    bounds = [-(-len(rows) * rank // ranks) for rank in range(ranks + 1)]
    return [list(rows[start:end]) for start, end in itertools.pairwise(bounds)]


def training_parts(
    batch: Batch, size: int | None, tokens: int | None, moves_B: torch.Tensor, ranks: Ranks
) -> list[tuple[Batch, bool]]:
    """This rank's micro-batches of a mini-batch, and whether each has a gradient; `size`, `tokens`:
    `micro_batches`.

    `moves_B`: which sequences can have one; those not trained on are left out. Every rank gets as
    many micro-batches, for a sharded model computes on all ranks at once, and backwards too: one
    that has fewer gets blank ones. Nothing to train on anywhere gives none.
    """
    trained = [i for i, any_token in enumerate(batch.loss_mask.any(dim=1).tolist()) if any_token]
    moves = moves_B.tolist()
    if ranks.size > 1 or not any(moves[row] for row in trained):
        # A gradient of zero is one still: the optimizer's momentum goes on.
        moves = [True] * len(batch)
    parts: list[tuple[Batch, bool]] = []
    for kind in (True, False):
        rows = [row for row in trained if moves[row] is kind]
        plans = [micro_batches(batch, own, size, tokens) for own in shares(rows, ranks.size)]
        own = [batch.take(part) for part in plans[ranks.rank]]
        missing = max(map(len, plans)) - len(own)
        blank = [batch.take(rows[:1]).untrained()] * missing if missing else []
        parts += [(part, kind) for part in own + blank]
    return parts


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    engine_logprobs: Sequence[Sequence[float]],
    *,
    pad_id: int,
) -> Batch:
    """Token ids of B samples and the engine's log-probabilities of their completions -> a Batch;
    all tokens train.
    """
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
    """A tensor on a device; to a GPU from pinned memory, so that the process does not wait for the
    copy.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def prompt_numbers(batch: Batch) -> list[int]:
    """A number for each sequence's prompt; equal prompts have equal ones."""
    numbers: dict[bytes, int] = {}
    both = np.stack([batch.prompt_ids.numpy(), batch.prompt_mask.numpy()], axis=1)
    return [numbers.setdefault(row.tobytes(), len(numbers)) for row in both]
