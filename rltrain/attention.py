"""Attention of a packed row, block by block; without a packing it is transformers' own `sdpa`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rltrain.packing import Packing

NAME = "packed_sdpa"

# cuDNN's attention builds a graph for every new shape: a step on an H100 took five times as long.
torch.backends.cuda.enable_cudnn_sdp(False)


def packed_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, packing: Packing | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`[1, H, N, d]` each -> `[1, N, H, d]`, as transformers' attention functions do."""
    if packing is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    heads, size = query.shape[1], query.shape[3]
    rows = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]
    outputs = []
    for block in packing.blocks:
        q, k, v = (
            # `embedding` adds up the gradients of a token that many see in a fixed order, and fast.
            embedding(places, tensor).unflatten(-1, (-1, size)).transpose(1, 2)
            for places, tensor in zip((block.queries, block.keys, block.keys), rows, strict=True)
        )
        output, _ = sdpa_attention_forward(module, q, k, v, block.mask, **kwargs)
        outputs.append(output.flatten(0, 1).flatten(1))
    whole = embedding(packing.slots, torch.cat(outputs)).unflatten(-1, (heads, size))
    return whole.unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_pack(config: Any) -> bool:
    """Whether each layer's attention is this one, over all of a sequence."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return config._attn_implementation == NAME and kinds == {"full_attention"}
