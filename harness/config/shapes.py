"""Sizes of causal language models: by their config.json, by the hub's cache on this machine, or as
published.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.paths import locate

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder of the Llama family (Llama, Qwen2, Qwen3, SmolLM2); `tied`: the embedding
    is the head too.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def query(self) -> int:
        """Width of a token's queries, all heads together."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of a token's keys, and of its values, all heads together."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's projections; norms and biases are a ten-thousandth of
        a model.
        """
        return sum(inputs * outputs for inputs, outputs in self.linears().values())

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, and of the head where it has its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.embedding_parameters + self.layers * self.layer_parameters

    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each projection of a layer, by PEFT's name."""
        hidden, inner = self.hidden, self.intermediate
        attention = {
            "q_proj": (hidden, self.query),
            "k_proj": (hidden, self.key_value),
            "v_proj": (hidden, self.key_value),
            "o_proj": (self.query, hidden),
        }
        return attention | {
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def cache_bytes_per_token(self, dtype_bytes: int, split: int = 1) -> int:
        """Bytes of one token's keys and values in all layers, on one of `split` GPUs that share its
        heads.
        """
        return 2 * self.layers * math.ceil(self.kv_heads / split) * self.head_dim * dtype_bytes

    def adapter_parameters(self, rank: int, modules: Sequence[str] = ATTENTION + MLP) -> int:
        """Parameters of A and B of these projections in every layer."""
        linears = self.linears()
        return rank * self.layers * sum(sum(linears[name]) for name in modules)


# As in the models' config.json on the hub; tests/unit/harness/config/test_shapes.py holds them
# against the published totals.
_PUBLISHED = {
    "Qwen2.5-0.5B": ModelShape(896, 24, 14, 2, 64, 4864, 151_936, True),
    "Qwen2.5-1.5B": ModelShape(1536, 28, 12, 2, 128, 8960, 151_936, True),
    "Qwen2.5-3B": ModelShape(2048, 36, 16, 2, 128, 11_008, 151_936, True),
    "Qwen2.5-7B": ModelShape(3584, 28, 28, 4, 128, 18_944, 152_064, False),
    "Qwen2.5-14B": ModelShape(5120, 48, 40, 8, 128, 13_824, 152_064, False),
    "Qwen2.5-32B": ModelShape(5120, 64, 40, 8, 128, 27_648, 152_064, False),
    "Qwen3-0.6B": ModelShape(1024, 28, 16, 8, 128, 3072, 151_936, True),
    "Qwen3-1.7B": ModelShape(2048, 28, 16, 8, 128, 6144, 151_936, True),
    "Qwen3-4B": ModelShape(2560, 36, 32, 8, 128, 9728, 151_936, True),
    "Qwen3-8B": ModelShape(4096, 36, 32, 8, 128, 12_288, 151_936, False),
    "Qwen3-14B": ModelShape(5120, 40, 40, 8, 128, 17_408, 151_936, False),
    "Qwen3-32B": ModelShape(5120, 64, 64, 8, 128, 25_600, 151_936, False),
    "Llama-3.2-1B": ModelShape(2048, 16, 32, 8, 64, 8192, 128_256, True),
    "Llama-3.2-3B": ModelShape(3072, 28, 24, 8, 128, 8192, 128_256, True),
    "Llama-3.1-8B": ModelShape(4096, 32, 32, 8, 128, 14_336, 128_256, False),
    "SmolLM2-135M": ModelShape(576, 30, 9, 3, 64, 1536, 49_152, True),
    "SmolLM2-360M": ModelShape(960, 32, 15, 5, 64, 2560, 49_152, True),
    "SmolLM2-1.7B": ModelShape(2048, 24, 32, 32, 64, 8192, 49_152, True),
}
# What a name may hold besides without another shape.
_VARIANT = re.compile(r"^Meta-|-(Coder|Math|Base|(Instruct|Thinking)(-2507)?)(?=-|$)")


def shape_of(path: str) -> ModelShape | None:
    """Sizes of a local model, or of one of the hub by its name, without network; None when they are
    not known.
    """
    found = read_config(path)
    if not found and locate(path) is None:
        found = _cached_config(path)
        if not found:
            return _PUBLISHED.get(_VARIANT.sub("", path.rpartition("/")[2]))
    return shape_from(found)


def shape_from(config: Mapping[str, Any]) -> ModelShape | None:
    """Sizes by a config.json; None where it says too little, or is a mixture of experts'."""
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        shape = ModelShape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    sizes = (
        shape.hidden,
        shape.layers,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.intermediate,
        shape.vocab,
    )
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
    return shape if whole and not any(config.get(key) for key in _EXPERTS) else None


def read_config(path: str) -> dict[str, Any]:
    """A local model's config.json; empty where there is none. Damage is for others to report."""
    return _read(locate(f"{path}/config.json"))


def _cached_config(name: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError, OSError):  # a name that the hub could not have
        found = try_to_load_from_cache(name, "config.json")
        return _read(Path(found)) if isinstance(found, str) else {}
    return {}


def _read(file: Path | None) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
