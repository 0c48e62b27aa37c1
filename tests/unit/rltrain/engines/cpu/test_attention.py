"""Attention over shared prompts: bits do not depend on how many sequences share a prompt."""

from __future__ import annotations

import pytest
import torch

from rltrain.engines.cpu.attention import SharedPrompts

GROUPS, PROMPT, MOST = 2, 40, 9


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_a_sequence_attends_the_same_to_the_bit_whoever_shares_its_prompt(head_dim: int) -> None:
    torch.manual_seed(0)
    prompt = torch.randn(2, 1, GROUPS, PROMPT, head_dim)
    query, key, value = torch.randn(3, MOST, GROUPS, head_dim)

    def attended(count: int) -> torch.Tensor:
        cache = SharedPrompts(
            torch.tensor([PROMPT]), torch.zeros(count, dtype=torch.long), 1, GROUPS, 1, head_dim
        )
        cache.store(0, 0, prompt[0], prompt[1])
        cache.grow()
        return cache.attend(0, query[:count], key[:count], value[:count])

    among_all = attended(MOST)
    for count in range(1, MOST):
        assert torch.equal(attended(count), among_all[:count]), count
