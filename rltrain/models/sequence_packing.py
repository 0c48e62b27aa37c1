"""Sequences as one row of tokens without padding, in which a prompt that several of them share
stands once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from rltrain.data.batch import Batch, prompt_numbers, to_device

# Rows of attention at least so long, as a share of their block's longest, are padded to it.
FILLED = 0.75

Places = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Block:
    """Stretches of tokens whose attention is computed together, as places in the packed row.

    `queries` `[R, Q]` and `keys` `[R, K]` are padded with places that do no harm; `mask` `[R, 1, Q,
    K]` says what each query sees, None: a stretch sees itself up to each token, and its keys are
    its queries.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Stretches:
    """The same stretches for one call of attention with variable lengths
    (`torch.nn.attention.varlen`).

    `queries` `[N]` and `keys` `[K]` are places in the packed row, stretch after stretch; a
    stretch's last query sees all of its keys, and each before it one less. `query_starts` and
    `key_starts` `[S + 1]`, int32, say where each begins.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True, slots=True)
class Packing:
    """A packed row of N tokens, those that predict one of a completion's last.

    `input_ids` and `position_ids` `[1, N]`; what its attention is computed by: `blocks`, or
    `stretches`; `slots` `[N]`: where each token stands among all queries of these; `predictors`:
    how many of the row's last tokens predict; `rows` `[M]`: for each of the completions' M tokens,
    in the order of the batch, the one of these that predicts it.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    blocks: list[Block]
    stretches: Stretches | None
    slots: torch.Tensor
    predictors: int
    rows: torch.Tensor

    def to(self, device: torch.device) -> Packing:
        """The same with its tensors on a device."""
        return Packing(*(_moved(getattr(self, item.name), device) for item in fields(self)))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return to_device(value, device)
    if isinstance(value, list):
        return [_moved(one, device) for one in value]
    if isinstance(value, Stretches | Block):
        return type(value)(*(_moved(getattr(value, item.name), device) for item in fields(value)))
    return value


def pack(batch: Batch, *, share: bool, varlen: bool = False) -> Packing:
    """A batch on the CPU as one row; `share`: prompts that are equal are computed once, else each
    sequence has its own.

    `varlen`: for one call of attention with variable lengths, else in blocks.
    """
    numbers = prompt_numbers(batch) if share else list(range(len(batch)))
    prompt_lengths, lengths = (
        batch.prompt_mask.sum(dim=1).tolist(),
        batch.mask.sum(dim=1).long().tolist(),
    )
    prompt_ids, completion_ids = batch.prompt_ids.numpy(), batch.completion_ids.numpy()
    first = {number: row for row, number in reversed(list(enumerate(numbers)))}
    # All of a prompt but its last token predicts nothing, and goes before everything that does.
    quiet = sum(prompt_lengths[row] - 1 for row in first.values())
    total = quiet + len(first) + sum(max(0, length - 1) for length in lengths)
    ids, positions = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    prompts: dict[int, Places] = {}
    start = 0
    for place, (number, row) in enumerate(sorted(first.items())):
        length = prompt_lengths[row]
        prompts[number] = np.append(np.arange(start, start + length - 1), quiet + place)
        ids[prompts[number]] = prompt_ids[row, -length:]
        positions[prompts[number]] = np.arange(length)
        start += length - 1
    shared = {number for number, count in Counter(numbers).items() if count > 1}
    none = np.zeros(0, dtype=np.int64)
    stretches = [(none, prompts[number]) for number in sorted(shared)]
    predicting: list[Places] = []
    start = quiet + len(first)
    for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
        # A completion's last token predicts nothing: it is no input.
        own = np.arange(start, start + max(0, length - 1))
        start += len(own)
        prompt = prompts[number]
        ids[own] = completion_ids[row, : len(own)]
        positions[own] = len(prompt) + np.arange(len(own))
        predicting.append(np.append(prompt[-1], own)[:length] - quiet)
        stretches.append((prompt, own) if number in shared else (none, np.append(prompt, own)))
    stretches = [stretch for stretch in stretches if len(stretch[1])]
    blocks, slots = ([], _slots(stretches, total)) if varlen else _blocks(stretches, total)
    return Packing(
        input_ids=torch.from_numpy(ids).unsqueeze(0),
        position_ids=torch.from_numpy(positions).unsqueeze(0),
        blocks=blocks,
        stretches=_in_turn(stretches) if varlen else None,
        slots=torch.from_numpy(slots),
        predictors=total - quiet,
        rows=torch.from_numpy(np.concatenate(predicting)),
    )


def _in_turn(stretches: Sequence[tuple[Places, Places]]) -> Stretches:
    queries, keys = [own for _, own in stretches], [np.append(seen, own) for seen, own in stretches]
    (q_places, q_starts, q_longest), (k_places, k_starts, k_longest) = map(_joined, (queries, keys))
    return Stretches(q_places, k_places, q_starts, k_starts, q_longest, k_longest)


def _joined(parts: Sequence[Places]) -> tuple[torch.Tensor, torch.Tensor, int]:
    lengths = [len(part) for part in parts]
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return torch.from_numpy(np.concatenate(parts)), starts, max(lengths)


def _slots(stretches: Sequence[tuple[Places, Places]], total: int) -> Places:
    slots = np.zeros(total, dtype=np.int64)
    slots[np.concatenate([own for _, own in stretches])] = np.arange(total)
    return slots


def _blocks(stretches: Sequence[tuple[Places, Places]], total: int) -> tuple[list[Block], Places]:
    """Stretches, each (what it sees before itself, itself), in blocks of like length; each token's
    slot in them.
    """
    # By length, then as they came: equal batches make equal blocks.
    order = sorted(stretches, key=lambda s: (len(s[0]) > 0, -len(s[1])))
    groups: list[list[tuple[Places, Places]]] = []
    for seen, own in order:
        head = groups[-1][0] if groups else None
        if head and (len(head[0]) > 0) == (len(seen) > 0) and len(own) >= FILLED * len(head[1]):
            groups[-1].append((seen, own))
        else:
            groups.append([(seen, own)])
    slots = np.zeros(total, dtype=np.int64)
    blocks: list[Block] = []
    base = 0
    for group in groups:
        width, before = len(group[0][1]), max(len(seen) for seen, _ in group)
        span = max(len(seen) + len(own) for seen, own in group)
        queries = np.zeros((len(group), width), dtype=np.int64)
        keys = np.zeros((len(group), span), dtype=np.int64)
        for row, (seen, own) in enumerate(group):
            queries[row, : len(own)] = own
            keys[row, : len(seen)] = seen
            keys[row, len(seen) : len(seen) + len(own)] = own
            slots[own] = base + row * width + np.arange(len(own))
        mask = None
        if before:
            reach = (
                np.array([len(seen) for seen, _ in group])[:, None, None, None]
                + np.arange(width)[:, None]
            )
            mask = torch.from_numpy(np.arange(span) <= reach)
        blocks.append(Block(torch.from_numpy(queries), torch.from_numpy(keys), mask))
        base += queries.size
    return blocks, slots
