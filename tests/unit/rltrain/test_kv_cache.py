"""Bytes that keys and values of one token take."""

from __future__ import annotations

import pytest

from rltrain.kv_cache import kv_bytes_per_token

# Layers, KV heads and head dimension as published.
QWEN2_5_05B = {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}
QWEN3_06B = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 1024,
             "head_dim": 128}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QWEN2_5_05B, 2 * 24 * 2 * 64 * 2),
        (QWEN3_06B, 2 * 28 * 8 * 128 * 2),  # its heads are wider than hidden_size / heads
        ({**QWEN2_5_05B, "num_key_value_heads": None, "head_dim": None}, 2 * 24 * 14 * 64 * 2),
        ({"vision_config": {}, "text_config": QWEN2_5_05B}, 2 * 24 * 2 * 64 * 2),
    ],
)
def test_bytes_follow_from_the_config(config: dict[str, object], expected: int) -> None:
    assert kv_bytes_per_token(config, 2) == expected
    assert kv_bytes_per_token(config, 4) == 2 * expected


def test_what_a_config_lacks_is_named() -> None:
    with pytest.raises(KeyError, match="num_hidden_layers"):
        kv_bytes_per_token({"num_attention_heads": 4, "hidden_size": 32}, 2)
