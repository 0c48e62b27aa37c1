"""Compare FlashAttention's call over a packed row with the same attention in blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu.test_logprobs import sequences

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, SIZE = 8, 2, 64


@pytest.mark.parametrize("samples", [1, 4])
def test_one_call_is_what_the_blocks_are(device: str, samples: int) -> None:
    import torch

    if device == "cpu":
        pytest.skip(
            "FlashAttention is for GPUs; "
            "tests/unit/rltrain/models/test_sequence_packing.py tests its arithmetic"
        )
    from rltrain.models.attention import has_varlen, packed_attention
    from rltrain.models.sequence_packing import pack
    from tests.gpu.ours import batch_of

    where = torch.device(device)
    assert has_varlen(where, torch.bfloat16)
    batch = batch_of(*sequences(prompts=4, samples=samples, length=40))
    layer: Any = SimpleNamespace(
        num_key_value_groups=HEADS // KV_HEADS, is_causal=True, training=False
    )
    results = []
    for varlen in (True, False):
        packing = pack(batch, share=True, varlen=varlen, device=where)
        torch.manual_seed(0)
        tokens = packing.input_ids.shape[1]
        shapes = [(1, heads, tokens, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        inputs = [
            torch.randn(shape, device=where, dtype=torch.bfloat16, requires_grad=True)
            for shape in shapes
        ]
        query, key, value = inputs
        output, _ = packed_attention(
            layer, query, key, value, None, packing=packing, scaling=SIZE**-0.5
        )
        weights = torch.randn(output.shape, device=where, dtype=torch.bfloat16)
        results.append([output, *torch.autograd.grad(output, inputs, weights)])
    for one, other in zip(*results, strict=True):
        # Half precision has 8 bits. A mask that is off by one token changes outputs by about 1.
        assert (one.float() - other.float()).norm() < 0.02 * other.float().norm()
