"""Attention of a packed row, in one call on a GPU, else in blocks; without a packing it is
transformers' `sdpa`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import embedding
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rltrain.models.sequence_packing import Packing

NAME = "packed_sdpa"

# A window that ends with the token itself; with more keys than queries both ends are aligned
# (FlashAttention 2.1).
CAUSAL = (-1, 0)
# torch 2.11 takes fewer heads of keys than of queries as they are, later versions want to be told.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)

# cuDNN's attention builds a graph for every new shape: a step on an H100 took five times as long.
torch.backends.cuda.enable_cudnn_sdp(False)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`[1, H, N, d]` each -> `[1, N, H, d]`, as transformers' attention functions do."""
    if packing is None:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return found
    if packing.stretches is not None:
        return _varlen(query, key, value, packing, kwargs["scaling"]), None
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


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
) -> torch.Tensor:
    """All stretches in one call: each one's queries see what stands before it and, among its own,
    what came earlier.
    """
    assert packing.stretches is not None
    stretches, size = packing.stretches, query.shape[3]
    # Under autocast rotated queries and keys are float32.
    queries = _Permute.apply(
        query[0].transpose(0, 1).to(value.dtype), stretches.queries, packing.slots
    )
    both = torch.cat(
        [key[0].transpose(0, 1).flatten(1).to(value.dtype), value[0].transpose(0, 1).flatten(1)],
        dim=1,
    )
    keys, values = embedding(stretches.keys, both).unflatten(1, (2, -1, size)).unbind(1)
    output = varlen_attn(
        queries,
        keys,
        values,
        stretches.query_starts,
        stretches.key_starts,
        stretches.longest_query,
        stretches.longest_key,
        scale=scaling,
        window_size=CAUSAL,
        **_GROUPED,
    )
    whole: torch.Tensor = _Permute.apply(output, packing.slots, stretches.queries)
    return whole.unsqueeze(0)


class _Permute(torch.autograd.Function):
    """x[order], whose gradient is gathered by the inverse order instead of added up place
    by place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return gradients[0][inverse], None, None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlashAttention computes in this dtype on this device: a GPU of the Ampere generation
    or later.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def can_pack(config: Any) -> bool:
    """Whether each layer's attention is this one, over all of a sequence."""
    # Without a list of its layers a model with a window (Mistral) has it in each.
    window = getattr(config, "sliding_window", None) is not None
    kinds = set(
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"]
    )
    return config._attn_implementation == NAME and kinds == {"full_attention"}
