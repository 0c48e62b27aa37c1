"""Divide a batch into micro-batches, and these among ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from rltrain.data.batch import Batch, prompt_numbers
from rltrain.distributed.process_group import Ranks


def micro_batches(
    batch: Batch, rows: Sequence[int], size: int | None, tokens: int | None
) -> list[list[int]]:
    """Return rows of a batch, in order, in groups of at most `size` sequences and `tokens` tokens.

    None sets no limit. A prompt counts once in a group, as it is computed once. A sequence that is
    longer than the limit is a group by itself.
    """
    numbers = prompt_numbers(batch)
    prompts, completions = (
        batch.prompt_mask.sum(dim=1).tolist(),
        batch.mask.sum(dim=1).long().tolist(),
    )
    max_rows, max_tokens = size or math.inf, tokens or math.inf
    groups: list[list[int]] = []
    seen: set[int] = set()
    total = 0
    for row in rows:
        added = completions[row] + (0 if numbers[row] in seen else prompts[row])
        if not groups or len(groups[-1]) == max_rows or total + added > max_tokens:
            groups.append([])
            seen, total, added = set(), 0, completions[row] + prompts[row]
        groups[-1].append(row)
        seen.add(numbers[row])
        total += added
    return groups


def shares(rows: Sequence[int], ranks: int) -> list[list[int]]:
    """Return rows in `ranks` consecutive parts of nearly equal size.

    Samples of a prompt are neighbours, so most prompts are computed by one rank.
    """
    bounds = [-(-len(rows) * rank // ranks) for rank in range(ranks + 1)]
    return [list(rows[start:end]) for start, end in itertools.pairwise(bounds)]


def training_parts(
    batch: Batch, size: int | None, tokens: int | None, needs_grad_B: torch.Tensor, ranks: Ranks
) -> list[tuple[Batch, bool]]:
    """Return this rank's micro-batches of a mini-batch, and whether each needs a backward pass.

    `size` and `tokens` are as for `micro_batches`; `needs_grad_B` says which sequences need a
    backward pass. Sequences without trained tokens are left out, and nothing is returned where none
    is trained. All ranks get equally many micro-batches, blank ones if need be, because a sharded
    model computes on all ranks at once, forward and backward.
    """
    trained = [i for i, any_token in enumerate(batch.loss_mask.any(dim=1).tolist()) if any_token]
    needs_grad = needs_grad_B.tolist()
    if ranks.size > 1 or not any(needs_grad[row] for row in trained):
        # With a zero gradient the optimizer still steps: its momentum moves the weights.
        needs_grad = [True] * len(batch)
    parts: list[tuple[Batch, bool]] = []
    for backward in (True, False):
        rows = [row for row in trained if needs_grad[row] is backward]
        plans = [micro_batches(batch, share, size, tokens) for share in shares(rows, ranks.size)]
        micros = [batch.take(part) for part in plans[ranks.rank]]
        missing = max(map(len, plans)) - len(micros)
        blank = [batch.take(rows[:1]).untrained()] * missing if missing else []
        parts += [(part, backward) for part in micros + blank]
    return parts
