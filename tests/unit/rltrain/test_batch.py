"""Tensors from samples, and named random streams."""

from __future__ import annotations

import torch

from rltrain.batch import Batch, collate
from rltrain.seeding import permutation, stream_seed


def _batch() -> Batch:
    return collate(
        [[5, 6, 7], [8]], [[1, 2], [3, 4, 9]], [[-0.1, -0.2], [-0.3, -0.4, -0.5]], pad_id=0, device=torch.device("cpu")
    )


def test_prompts_are_padded_left_and_completions_right() -> None:
    batch = _batch()
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.completion_ids.tolist() == [[1, 2, 0], [3, 4, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 3]]
    assert batch.tokens == 5


def test_parts_drop_padding_that_only_others_needed() -> None:
    first, second = _batch().split(1)
    assert first.completion_ids.tolist() == [[1, 2]]
    assert second.prompt_ids.tolist() == [[8]]
    assert torch.allclose(second.engine_logprobs, torch.tensor([[-0.3, -0.4, -0.5]]))


def test_an_empty_completion_keeps_its_row() -> None:
    batch = collate([[5], [6]], [[], [1]], [[], [-0.1]], pad_id=0, device=torch.device("cpu"))
    assert batch.mask.tolist() == [[0.0], [1.0]]
    assert [len(part) for part in batch.split(1)] == [1, 1]


def test_streams_depend_on_seed_and_name_only() -> None:
    assert stream_seed(0, "sampling", 3, 1) == stream_seed(0, "sampling", 3, 1)
    seeds = {stream_seed(s, name, i) for s in (0, 1) for name in ("sampling", "eval") for i in range(100)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**48 for seed in seeds)


def test_permutation_is_a_reproducible_shuffle() -> None:
    order = permutation(3, "data", 0, length=50)
    assert sorted(order) == list(range(50))
    assert order == permutation(3, "data", 0, length=50)
    assert order != permutation(3, "data", 1, length=50)
