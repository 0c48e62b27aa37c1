"""A decoder for float32 models of the Llama family: few, large operations; adapters merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

from rltrain.engines.cpu.attention import SharedPrompts, padded
from rltrain.engines.cpu.products import fewest_rows
from rltrain.models.lora import base_model

ARCHITECTURES = {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
ROPES = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles depend on the position alone."""

PREFILL_TOKENS = 4096
"""Prompt tokens in one pass: the activations of more leave a CPU's cache."""


def supports(model: Any, member: str | None) -> bool:
    """Return whether LlamaDecoder computes the model with the member's adapter on (None: off)."""
    base = base_model(model)
    config = base.config
    if type(base).__name__ not in ARCHITECTURES or config.hidden_act != "silu":
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    if base.model.rotary_emb.rope_type not in ROPES:
        return False
    if any(
        type(p) is not torch.nn.Parameter or p.dtype != torch.float32 for p in base.parameters()
    ):
        return False
    return all(_plain(module, member) for module in base.modules())


def _plain(module: torch.nn.Module, member: str | None) -> bool:
    """Return whether a module is unadapted, or a linear layer plus B A and nothing else."""
    if not isinstance(module, BaseTunerLayer):
        return not isinstance(module, AuxiliaryTrainingWrapper)
    if module.merged or not isinstance(module, LoraLayer):
        return False
    if member in module.lora_A:
        linear = isinstance(module.get_base_layer(), torch.nn.Linear)
        return (
            linear and member not in module.lora_variant and not module.lora_bias.get(member, False)
        )
    return member not in module.lora_embedding_A


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[N, out]` for `[N, in]`; a row's bits do not depend on the other rows."""
        missing = fewest_rows() - x.shape[0]
        if missing > 0:
            return F.linear(F.pad(x, (0, 0, 0, missing)), self.weight, self.bias)[: x.shape[0]]
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor
    query_key_value: _Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    out: _Linear
    mlp_norm: torch.Tensor
    gate_up: _Linear
    down: _Linear


class _Weights:
    """The model's weights with one adapter merged into copies; the model is left unchanged.

    Rows of queries and keys are reordered so that the two halves that rotary embeddings mix are
    neighbours, and queries are scaled as attention needs. Neither changes a product of query and
    key.
    """

    def __init__(self, base: Any, member: str | None) -> None:
        config = base.config
        self.embedding = base.get_input_embeddings().weight
        attention = base.model.layers[0].self_attn
        self.head_dim: int = attention.head_dim
        self.groups: int = config.num_key_value_heads
        self.repeats: int = config.num_attention_heads // config.num_key_value_heads
        self.eps: float = config.rms_norm_eps
        self.layers = [self._layer(layer, member) for layer in base.model.layers]
        self.norm = base.model.norm.weight
        self.head = _merged(base.get_output_embeddings(), member)
        self._rotary = base.model.rotary_emb
        self._rotations = torch.empty(0, self.head_dim // 2, dtype=torch.complex64)

    def rotations(self, positions: int) -> torch.Tensor:
        """Return cos + i sin of each position's angles, `[>= positions, head_dim / 2]`."""
        if len(self._rotations) < positions:
            cos, sin = self._rotary(
                self.embedding, torch.arange(2 * positions, device=self.embedding.device)[None]
            )
            half = self.head_dim // 2
            cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
            self._rotations = torch.complex(cos, sin)
        return self._rotations

    def _layer(self, layer: Any, member: str | None) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        scale = attention.scaling
        query, key, value = (
            _merged(module, member)
            for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = (
            self._reordered(query, scale if query_norm is None else 1.0),
            self._reordered(key, 1.0),
        )
        return _Layer(
            attention_norm=layer.input_layernorm.weight,
            query_key_value=_joined([query, key, value]),
            query_norm=None if query_norm is None else query_norm.weight[self._order()] * scale,
            key_norm=None if key_norm is None else key_norm.weight[self._order()],
            out=_merged(attention.o_proj, member),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate_up=_joined([_merged(mlp.gate_proj, member), _merged(mlp.up_proj, member)]),
            down=_merged(mlp.down_proj, member),
        )

    def _reordered(self, linear: _Linear, scale: float) -> _Linear:
        def rows(tensor: torch.Tensor) -> torch.Tensor:
            heads = tensor.unflatten(0, (-1, self.head_dim))
            return heads[:, self._order()].flatten(0, 1) * scale

        return _Linear(rows(linear.weight), None if linear.bias is None else rows(linear.bias))

    def _order(self) -> torch.Tensor:
        return torch.arange(self.head_dim).view(2, -1).t().flatten()


def _merged(module: Any, member: str | None) -> _Linear:
    """Return W + alpha/r B A of a layer that the member adapts (LoRA, arXiv 2106.09685, eq. 3)."""
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(module, LoraLayer) and member in module.lora_A:
        return _Linear(base.weight + module.get_delta_weight(member), base.bias)
    return _Linear(base.weight, base.bias)


def _joined(parts: Sequence[_Linear]) -> _Linear:
    """Return one layer for several with the same input."""
    biases = [part.bias for part in parts if part.bias is not None]
    return _Linear(
        torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None
    )


class LlamaDecoder:
    """Decodes sequences of one member, with the weights of the time when it was made."""

    def __init__(self, model: Any, member: str | None) -> None:
        self._weights = _Weights(base_model(model), member)

        self._positions = torch.empty(0, dtype=torch.long)
        self._attention: SharedPrompts | None = None

    def prefill(self, prompts: Sequence[Sequence[int]], prompt_of_N: torch.Tensor) -> torch.Tensor:
        """Return logits `[N, V]` after the prompts.

        Prompts are padded on the right, where the causal mask keeps padding from changing them.
        """
        weights, device = self._weights, prompt_of_N.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._attention = SharedPrompts(
            lengths,
            prompt_of_N,
            len(weights.layers),
            weights.groups,
            weights.repeats,
            weights.head_dim,
        )
        hidden, start = [], 0
        while start < len(prompts):
            count = max(1, PREFILL_TOKENS // self._attention.width)
            hidden.append(self._prefill_part(prompts, start, min(start + count, len(prompts))))
            start += count
        self._positions = lengths[prompt_of_N]
        return self._logits(torch.cat(hidden))[prompt_of_N]

    def step(self, token_N: torch.Tensor) -> torch.Tensor:
        """Return logits `[N, V]` after one more token each."""
        assert self._attention is not None
        weights = self._weights
        rotations = weights.rotations(self._attention.width + self._attention.steps + 1)
        rotation = rotations[self._positions][:, None]
        x = F.embedding(token_N, weights.embedding)
        self._attention.grow()
        for index, layer in enumerate(weights.layers):
            query, key, value = self._query_key_value(layer, x, rotation)
            x = x + layer.out(self._attention.attend(index, query, key, value))
            x = x + self._mlp(layer, x)
        self._positions = self._positions + 1
        return self._logits(x)

    def keep(self, rows: torch.Tensor) -> None:
        """Continue with these sequences only."""
        assert self._attention is not None
        self._attention.keep(rows)
        self._positions = self._positions[rows]

    def _prefill_part(
        self, prompts: Sequence[Sequence[int]], start: int, stop: int
    ) -> torch.Tensor:
        """Return the last token's hidden state of some prompts, `[P, C]`; store keys and values.

        Only attention sees the prompts padded; all other layers see their tokens in one row.
        """
        assert self._attention is not None
        weights, part = self._weights, prompts[start:stop]
        device = weights.embedding.device
        ids = torch.tensor([token for prompt in part for token in prompt], device=device)
        lengths = torch.tensor([len(prompt) for prompt in part], device=device)
        width = padded(int(lengths.max()))
        real = torch.arange(width, device=device) < lengths[:, None]
        rotation = weights.rotations(width)[:width].expand(len(part), -1, -1)[real][:, None]
        x = F.embedding(ids, weights.embedding)
        for index, layer in enumerate(weights.layers):
            query, key, value = (
                rows.new_zeros(*real.shape, *rows.shape[1:])
                .index_put_((real,), rows)
                .transpose(1, 2)
                for rows in self._query_key_value(layer, x, rotation)
            )
            self._attention.store(index, start, key, value)
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=1.0, enable_gqa=weights.repeats > 1
            )
            mixed = mixed.transpose(1, 2)[real].flatten(1)
            if index == len(weights.layers) - 1:  # only the last token's output is used
                last = lengths.cumsum(0) - 1
                x, mixed = x[last], mixed[last]
            x = x + layer.out(mixed)
            x = x + self._mlp(layer, x)
        return x

    def _query_key_value(
        self, layer: _Layer, x: torch.Tensor, rotation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries `[N, H, D]`, rotated keys and values `[N, groups, D]`.

        x is `[N, C]`.
        """
        weights = self._weights
        heads = layer.query_key_value(self._normed(x, layer.attention_norm)).unflatten(
            -1, (-1, weights.head_dim)
        )
        both, value = heads.split([weights.groups * (weights.repeats + 1), weights.groups], dim=1)
        split = [weights.groups * weights.repeats, weights.groups]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = both.split(split, dim=1)
            both = torch.cat(
                [self._normed(query, layer.query_norm), self._normed(key, layer.key_norm)], dim=1
            )
        both = torch.view_as_real(
            torch.view_as_complex(both.unflatten(-1, (-1, 2))) * rotation
        ).flatten(-2)
        query, key = both.split(split, dim=1)
        return query, key, value

    def _mlp(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
        return layer.down(F.silu(gate) * up)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._weights.eps)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._weights.head(self._normed(x, self._weights.norm))
