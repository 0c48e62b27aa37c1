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

# How many tokens before and after its own a query sees, -1: all. With more keys than queries both
# ends are aligned (FlashAttention 2.1).
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
        return _attend(module, query, key, value, attention_mask, **kwargs), None
    window = kwargs.get("sliding_window")
    if packing.segments is not None:
        outputs = _varlen(query, key, value, packing.segments, packing, kwargs["scaling"], window)
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
        mask = block.mask
        if window is not None and window < block.keys.shape[1]:
            mask = _windowed(block, packing.position_ids[0], window)
        output = _attend(module, q, k, v, mask, **kwargs)
        parts.append(output.flatten(0, 1).flatten(1))
    outputs = embedding(packing.output_rows, torch.cat(parts)).unflatten(-1, (heads, size))
    return outputs.unsqueeze(0), None


def _windowed(block: AttentionBlock, positions: torch.Tensor, window: int) -> torch.Tensor:
    """Return a block's mask `[R, 1, Q, K]` where each query sees the last `window` tokens only."""
    distance = positions[block.queries].unsqueeze(2) - positions[block.keys].unsqueeze(1)
    near = (distance < window).unsqueeze(1)
    # Padding sits at position 0, from where every key is near: no query is without one.
    return near.tril() if block.mask is None else near & block.mask


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    softcap: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return outputs `[R, Q, H, d]`; without a mask attention is causal.

    Soft-capped scores (Gemma 2, arXiv 2408.00118) are computed here: no kernel of torch has them.
    """
    if softcap is None:
        output: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
        return output
    groups = query.shape[1] // key.shape[1]
    scores = query.unflatten(1, (-1, groups)) @ key.unsqueeze(2).transpose(-1, -2)
    scores = softcap * torch.tanh(scores.float() * (kwargs["scaling"] / softcap))
    if mask is None:
        queries, keys = scores.shape[-2:]
        mask = scores.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    scores = scores.masked_fill(~mask.unsqueeze(-3), torch.finfo(scores.dtype).min)
    mixed = scores.softmax(dim=-1).to(value.dtype) @ value.unsqueeze(2)
    return mixed.flatten(1, 2).transpose(1, 2)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    packing: Packing,
    scaling: float | None,
    window: int | None,
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
        window_size=CAUSAL if window is None else (window - 1, 0),
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
    """Return whether all layers use this attention, over the whole sequence or a sliding window."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return config._attn_implementation == NAME and kinds <= {
        "full_attention",
        "sliding_attention",
    }
