"""Attention over packed rows: one FlashAttention call on a GPU, else blocks; otherwise `sdpa`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import embedding
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed_sdpa"

# A window that ends with the token itself; with more keys than queries both ends are aligned
# (FlashAttention 2.1).
CAUSAL = (-1, 0)
# torch 2.11 accepts fewer key heads than query heads as they are; later versions need the flag.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)

# cuDNN's attention builds a graph for every new shape: a step on an H100 took five times as long.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """Segments of similar length that are computed together, as indices into the packed row.

    `queries` `[R, Q]` and `keys` `[R, K]` are padded with index 0, whose results are unused. `mask`
    `[R, 1, Q, K]` says which keys each query sees; None: causal, and the keys are the queries.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments for one call of variable-length attention (`torch.nn.attention.varlen`).

    `queries` `[N]` and `keys` `[K]` index the packed row, segment after segment. A segment's last
    query sees all of its keys, and each query before it one fewer. `query_starts` and `key_starts`
    `[S + 1]`, int32, are where segments begin.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    query_starts: torch.Tensor
    key_starts: torch.Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True, slots=True)
class Packing:
    """A packed row of N tokens; the tokens that predict a completion's token come last.

    `input_ids` and `position_ids` are `[1, N]`. Attention uses `blocks`, or `segments` where these
    are not None; `output_rows` `[N]` is each token's row in the concatenated results. The last
    `predictors` tokens predict; `rows` `[M]` indexes them, for each of the batch's M completion
    tokens in order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    blocks: list[AttentionBlock]
    segments: Segments | None
    output_rows: torch.Tensor
    predictors: int
    rows: torch.Tensor


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return attention outputs `[1, N, H, d]` for inputs `[1, H, N, d]`, as transformers' do."""
    if packing is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return result
    if packing.segments is not None:
        outputs = _varlen(query, key, value, packing.segments, packing, kwargs["scaling"])
        return outputs.unsqueeze(0), None
    heads, size = query.shape[1], query.shape[3]
    rows = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]
    parts = []
    for block in packing.blocks:
        q, k, v = (
            # `embedding` sums the gradients of a token that several others see in a fixed order.
            embedding(indices, tensor).unflatten(-1, (-1, size)).transpose(1, 2)
            for indices, tensor in zip((block.queries, block.keys, block.keys), rows, strict=True)
        )
        output, _ = sdpa_attention_forward(module, q, k, v, block.mask, **kwargs)
        parts.append(output.flatten(0, 1).flatten(1))
    outputs = embedding(packing.output_rows, torch.cat(parts)).unflatten(-1, (heads, size))
    return outputs.unsqueeze(0), None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    packing: Packing,
    scaling: float | None,
) -> torch.Tensor:
    """Return outputs `[N, H, d]`, all segments in one call."""
    # Under autocast rotated queries and keys are float32.
    queries = _Permute.apply(
        query[0].transpose(0, 1).to(value.dtype), segments.queries, packing.output_rows
    )
    both = torch.cat(
        [key[0].transpose(0, 1).flatten(1).to(value.dtype), value[0].transpose(0, 1).flatten(1)],
        dim=1,
    )
    keys, values = embedding(segments.keys, both).unflatten(1, (2, -1, query.shape[3])).unbind(1)
    output = varlen_attn(
        queries,
        keys,
        values,
        segments.query_starts,
        segments.key_starts,
        segments.longest_query,
        segments.longest_key,
        scale=scaling,
        window_size=CAUSAL,
        **_GROUPED,
    )
    result: torch.Tensor = _Permute.apply(output, packing.output_rows, segments.queries)
    return result


class _Permute(torch.autograd.Function):
    """x[order]; its gradient is gathered by the inverse order, without atomic additions."""

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
    """Return whether FlashAttention supports device and dtype: 16 bits on Ampere or newer."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def can_pack(config: Any) -> bool:
    """Return whether all layers use this attention, over the whole sequence."""
    # A model without a list of layers has its window, if any, in all of them (Mistral).
    window = getattr(config, "sliding_window", None) is not None
    kinds = set(
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"]
    )
    return config._attn_implementation == NAME and kinds == {"full_attention"}
