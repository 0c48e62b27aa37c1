"""Sync by merging: the engine gets base + scaled BA, or all weights of a plain model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from harness.core.errors import UserError
from rltrain.distributed.process_group import full
from rltrain.engines.base import Engine
from rltrain.models.lora import base_model


class MergeSync:
    """Replaces the engine's weights by merged ones: for full fine-tuning, and to decode fastest."""

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Give the engine `model`'s weights with the member's adapter merged into copies."""
        if not engine.shares_weights:
            engine.load_weights(merged_weights(model, member))


@torch.no_grad()
def merged_weights(model: Any, member: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for each tensor of the base model's `state_dict`, tied heads left out.

    Each weight that the PEFT adapter `member` targets becomes W + scale * B A (LoRA, arXiv
    2106.09685, eq. 3). A sharded model's tensors are gathered one at a time, so all ranks must
    iterate. Raises UserError for an adapter on one of two tied weights: merged, it would change
    both.
    """
    base = base_model(model)
    tied = (
        dict(getattr(base, "_tied_weights_keys", None) or {})
        if base.config.tie_word_embeddings
        else {}
    )
    adapted = {
        name: layer
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer)
        and (member in layer.lora_A or member in layer.lora_embedding_A)
    }
    both = {name.removesuffix(".weight") for name in (*tied, *tied.values())} & adapted.keys()
    if both:
        raise UserError(
            "an adapter on one of two tied weights cannot be merged",
            got=", ".join(sorted(both)),
            fix="leave it out of trainer.target_modules, or set generator.backend=transformers",
        )
    for name, tensor in base.state_dict().items():
        module, _, leaf = name.rpartition(".")
        module, is_base, _ = module.partition(".base_layer")
        if name in tied or ".lora_" in name:
            continue
        tensor = full(tensor)
        if is_base and leaf == "weight" and module in adapted:
            tensor = tensor + adapted[module].get_delta_weight(member).to(tensor.dtype)
        yield f"{module}.{leaf}", tensor.detach()
