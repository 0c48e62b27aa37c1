"""Pack a batch into one row of tokens without padding; a shared prompt is computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from rltrain.data.batch import Batch, prompt_numbers, to_device
from rltrain.models.attention import AttentionBlock, Packing, Segments

FILLED = 0.75
"""A segment joins a block, and is padded, if it has this share of the longest segment's length."""

CPU = torch.device("cpu")

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Segment = tuple[Indices, Indices]
"""Tokens that all of a segment sees, and the segment's own tokens, which are causally masked."""


def pack(batch: Batch, *, share: bool, varlen: bool = False, device: torch.device = CPU) -> Packing:
    """Return a CPU batch as one packed row on `device`.

    `share`: equal prompts are computed once; otherwise every sequence has its own. `varlen`:
    attention is one call with variable lengths; otherwise it is computed in blocks.
    """
    numbers = prompt_numbers(batch) if share else list(range(len(batch)))
    prompt_lengths, lengths = (
        batch.prompt_mask.sum(dim=1).tolist(),
        batch.mask.sum(dim=1).long().tolist(),
    )
    prompt_ids, completion_ids = batch.prompt_ids.numpy(), batch.completion_ids.numpy()
    first = {number: row for row, number in reversed(list(enumerate(numbers)))}
    # A prompt's tokens but the last predict nothing: they come before all tokens that do.
    silent = sum(prompt_lengths[row] - 1 for row in first.values())
    total = silent + len(first) + sum(max(0, length - 1) for length in lengths)
    ids, positions = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    prompts: dict[int, Indices] = {}
    start = 0
    for index, (number, row) in enumerate(sorted(first.items())):
        length = prompt_lengths[row]
        prompts[number] = np.append(np.arange(start, start + length - 1), silent + index)
        ids[prompts[number]] = prompt_ids[row, -length:]
        positions[prompts[number]] = np.arange(length)
        start += length - 1
    shared = {number for number, count in Counter(numbers).items() if count > 1}
    none = np.zeros(0, dtype=np.int64)
    segments: list[Segment] = [(none, prompts[number]) for number in sorted(shared)]
    predicting: list[Indices] = []
    start = silent + len(first)
    for row, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
        # A completion's last token predicts nothing: it is no input.
        tokens = np.arange(start, start + max(0, length - 1))
        start += len(tokens)
        prompt = prompts[number]
        ids[tokens] = completion_ids[row, : len(tokens)]
        positions[tokens] = len(prompt) + np.arange(len(tokens))
        predicting.append(np.append(prompt[-1], tokens)[:length] - silent)
        segments.append((prompt, tokens) if number in shared else (none, np.append(prompt, tokens)))
    segments = [segment for segment in segments if len(segment[1])]
    blocks: list[AttentionBlock] = []
    if varlen:
        output_rows = np.zeros(total, dtype=np.int64)
        output_rows[np.concatenate([tokens for _, tokens in segments])] = np.arange(total)
    else:
        blocks, output_rows = _blocks(segments, total, device)
    return Packing(
        input_ids=to_device(torch.from_numpy(ids).unsqueeze(0), device),
        position_ids=to_device(torch.from_numpy(positions).unsqueeze(0), device),
        blocks=blocks,
        segments=_joined(segments, device) if varlen else None,
        output_rows=to_device(torch.from_numpy(output_rows), device),
        predictors=total - silent,
        rows=to_device(torch.from_numpy(np.concatenate(predicting)), device),
    )


def _joined(segments: Sequence[Segment], device: torch.device) -> Segments:
    """Return the segments for one call of variable-length attention."""
    queries = [tokens for _, tokens in segments]
    keys = [np.append(seen, tokens) for seen, tokens in segments]

    def indices(parts: Sequence[Indices]) -> torch.Tensor:
        return to_device(torch.from_numpy(np.concatenate(parts)), device)

    def starts(parts: Sequence[Indices]) -> torch.Tensor:
        ends = np.cumsum([len(part) for part in parts])
        return to_device(torch.tensor([0, *ends], dtype=torch.int32), device)

    return Segments(
        queries=indices(queries),
        keys=indices(keys),
        query_starts=starts(queries),
        key_starts=starts(keys),
        longest_query=max(map(len, queries)),
        longest_key=max(map(len, keys)),
    )


def _blocks(
    segments: Sequence[Segment], total: int, device: torch.device
) -> tuple[list[AttentionBlock], Indices]:
    """Return the segments in blocks of like length, and each token's row in their results."""
    # By length, then as they came: equal batches make equal blocks.
    order = sorted(segments, key=lambda s: (len(s[0]) > 0, -len(s[1])))
    groups: list[list[Segment]] = []
    for seen, tokens in order:
        head = groups[-1][0] if groups else None
        if head and (len(head[0]) > 0) == (len(seen) > 0) and len(tokens) >= FILLED * len(head[1]):
            groups[-1].append((seen, tokens))
        else:
            groups.append([(seen, tokens)])
    output_rows = np.zeros(total, dtype=np.int64)
    blocks: list[AttentionBlock] = []
    base = 0
    for group in groups:
        width, before = len(group[0][1]), max(len(seen) for seen, _ in group)
        span = max(len(seen) + len(tokens) for seen, tokens in group)
        queries = np.zeros((len(group), width), dtype=np.int64)
        keys = np.zeros((len(group), span), dtype=np.int64)
        for row, (seen, tokens) in enumerate(group):
            queries[row, : len(tokens)] = tokens
            keys[row, : len(seen)] = seen
            keys[row, len(seen) : len(seen) + len(tokens)] = tokens
            output_rows[tokens] = base + row * width + np.arange(len(tokens))
        mask = None
        if before:
            reach = (
                np.array([len(seen) for seen, _ in group])[:, None, None, None]
                + np.arange(width)[:, None]
            )
            mask = to_device(torch.from_numpy(np.arange(span) <= reach), device)
        blocks.append(
            AttentionBlock(
                to_device(torch.from_numpy(queries), device),
                to_device(torch.from_numpy(keys), device),
                mask,
            )
        )
        base += queries.size
    return blocks, output_rows
