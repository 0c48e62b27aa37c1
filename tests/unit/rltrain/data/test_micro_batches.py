"""Micro-batches: sizes, token budgets, and the shares of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.config.schema import TrainerConfig
from rltrain.data.batch import Batch, collate
from rltrain.data.micro_batches import micro_batches, training_parts
from rltrain.distributed.process_group import Ranks
from rltrain.models.sequence_packing import pack

CPU = torch.device("cpu")


def _of_lengths(lengths: list[int]) -> Batch:
    """One prompt token each, completions of these lengths."""
    completions = [[1] * length for length in lengths]
    return collate([[5]] * len(lengths), completions, [[-1.0] * n for n in lengths], pad_id=0)


def test_micro_batches_of_so_many_sequences_keep_the_order() -> None:
    assert micro_batches(_of_lengths([3, 1, 2]), [2, 0, 1], 2, None) == [[2, 0], [1]]


def _of_groups(groups: list[list[int]]) -> Batch:
    """A prompt of two tokens for each group, completions of these lengths."""
    prompts = [[5, place] for place, lengths in enumerate(groups) for _ in lengths]
    completions = [[1] * length for lengths in groups for length in lengths]
    return collate(prompts, completions, [[-1.0] * len(c) for c in completions], pad_id=0)


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=8),
    st.integers(1, 120),
)
def test_a_token_budget_holds_and_loses_no_sequence(groups: list[list[int]], budget: int) -> None:
    batch = _of_groups(groups)
    parts = micro_batches(batch, range(len(batch)), None, budget)
    assert [row for part in parts for row in part] == list(range(len(batch)))
    prompt_of = [place for place, lengths in enumerate(groups) for _ in lengths]
    lengths = [length for group in groups for length in group]

    def tokens(rows: list[int]) -> int:
        return 2 * len({prompt_of[row] for row in rows}) + sum(lengths[row] for row in rows)

    for part, following in zip(parts, [*parts[1:], []], strict=True):
        assert tokens(part) <= budget or len(part) == 1
        assert not following or tokens([*part, following[0]]) > budget


@pytest.mark.parametrize(
    ("share", "tokens"), [(True, 2 * 2 + 2 + 0 + 3), (False, 3 * 2 + 2 + 0 + 3)]
)
def test_a_packed_row_has_no_padding_and_a_shared_prompt_once(share: bool, tokens: int) -> None:
    # The last token of a completion predicts nothing.
    packing = pack(_of_groups([[3, 1], [4]]), share=share)
    assert packing.input_ids.shape == packing.position_ids.shape == (1, tokens)
    assert packing.predictors == tokens - (2 if share else 3)
    assert packing.rows.max() < packing.predictors
    assert len(packing.rows) == 3 + 1 + 4
    tokens_in_order = torch.cat([block.queries.flatten() for block in packing.blocks])[
        packing.output_rows
    ]
    assert tokens_in_order.tolist() == list(range(tokens))


def _parts(
    batch: Batch, trainer: TrainerConfig, moves: torch.Tensor, rank: int, ranks: int
) -> list[Batch]:
    return [
        part
        for part, _ in training_parts(
            batch, trainer.micro_train_batch_size_per_gpu, None, moves, Ranks(rank, ranks, CPU)
        )
    ]


def test_ranks_train_on_every_sequence_once_and_as_often_as_each_other() -> None:
    trainer = TrainerConfig(micro_train_batch_size_per_gpu=2)
    batch = _of_lengths([1, 2, 3, 4, 5, 6, 7])
    batch.loss_mask[2] = 0
    all_move = torch.ones(7, dtype=torch.bool)
    parts = [_parts(batch, trainer, all_move, rank, 3) for rank in range(3)]
    assert {len(own) for own in parts} == {1}
    assert sorted(int(n) for own in parts for part in own for n in part.loss_mask.sum(dim=1)) == [
        1,
        2,
        4,
        5,
        6,
        7,
    ]
    # One sequence left for two ranks: the other computes it too, without training on it.
    batch.loss_mask[1:] = 0
    first, second = (_parts(batch, trainer, all_move, rank, 2) for rank in range(2))
    assert (first[0].tokens, second[0].tokens) == (1, 0)
    assert len(second[0]) == 1


def test_nothing_to_train_on_is_no_micro_batch() -> None:
    batch = _of_lengths([1, 2])
    batch.loss_mask.zero_()
    assert training_parts(batch, None, None, torch.ones(2, dtype=torch.bool), Ranks()) == []


def test_what_has_no_gradient_is_apart_on_one_rank_and_not_on_several() -> None:
    batch, moves = _of_lengths([1, 2, 3, 4, 5]), torch.tensor([True, False, True, False, True])
    found = training_parts(batch, 2, None, moves, Ranks())
    assert [(part.mask.sum(dim=1).tolist(), kind) for part, kind in found] == [
        ([1, 3], True),
        ([5], True),
        ([2, 4], False),
    ]
    assert all(kind for _, kind in training_parts(batch, None, None, moves, Ranks(0, 2, CPU)))
    # Nor where nothing has one: the optimizer steps with a gradient of zero, as it would on
    # several.
    assert [kind for _, kind in training_parts(batch, None, None, moves & ~moves, Ranks())] == [
        True
    ]
