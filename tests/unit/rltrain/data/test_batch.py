"""Batches: padding, and parts without it."""

from __future__ import annotations

import torch

from rltrain.data.batch import Batch, collate

CPU = torch.device("cpu")


def _batch() -> Batch:
    return collate(
        [[5, 6, 7], [8]], [[1, 2], [3, 4, 9]], [[-0.1, -0.2], [-0.3, -0.4, -0.5]], pad_id=0
    )


def test_prompts_are_padded_left_and_completions_right() -> None:
    batch = _batch()
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.completion_ids.tolist() == [[1, 2, 0], [3, 4, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 3]]
    assert batch.tokens == 5


def test_parts_drop_padding_that_only_others_needed() -> None:
    first, second = _batch().take([0]), _batch().take([1])
    assert first.completion_ids.tolist() == [[1, 2]]
    assert second.prompt_ids.tolist() == [[8]]
    assert torch.allclose(second.engine_logprobs, torch.tensor([[-0.3, -0.4, -0.5]]))


def test_an_empty_completion_keeps_its_row() -> None:
    batch = collate([[5], [6]], [[], [1]], [[], [-0.1]], pad_id=0)
    assert batch.mask.tolist() == [[0.0], [1.0]]
    assert [len(batch.take([row])) for row in range(2)] == [1, 1]
