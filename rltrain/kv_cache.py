"""How much memory keys and values take. Torch-free, so that estimates can be made before anything heavy starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def kv_bytes_per_token(config: Mapping[str, Any], dtype_bytes: int) -> int:
    """Return the bytes that keys and values of one token take in all layers, from a model's `config.json`.

    `dtype_bytes` are those of one number. The whole model's, before any split over GPUs; layers that keep a window or
    a compressed form of them take less. Raises KeyError naming what the config lacks.
    """
    text = config.get("text_config") or config  # models of text and images keep the language model's apart
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    return int(2 * text["num_hidden_layers"] * kv_heads * head_dim * dtype_bytes)
