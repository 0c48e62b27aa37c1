"""Sync by merging: the engine gets base + scaled BA, or all weights of a plain model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.core_model_loading import revert_weight_conversion

from harness.core.errors import UserError
from rltrain.distributed.process_group import full
from rltrain.engines.base import Engine
from rltrain.models.lora import base_model


class MergeSync:
    """Replaces the engine's weights by merged ones: for full fine-tuning, and to decode fastest."""

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Give the engine `model`'s weights with the member's adapter merged into copies."""
        if not engine.shares_weights:
            # By the names of stored models, which transformers changes where it joins experts.
            engine.load_weights(
                stored
                for named in merged_weights(model, member)
                for stored in revert_weight_conversion(base_model(model), dict([named])).items()
            )


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
    # A wrapper of one of a mixture's parameters has its name, and other wrappers in it.
    adapted = {
        f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}": layer
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer)
        and (member in layer.lora_A or member in layer.lora_embedding_A)
    }
    both = {*tied, *tied.values()} & adapted.keys()
    if both:
        raise UserError(
            "an adapter on one of two tied weights cannot be merged",
            got=", ".join(sorted(name.removesuffix(".weight") for name in both)),
            fix="leave it out of trainer.target_modules, or set generator.backend=transformers",
        )
    for name, tensor in base.state_dict().items():
        if name in tied or ".lora_" in name:
            continue
        name, tensor = name.replace(".base_layer", ""), full(tensor)
        if name in adapted:
            tensor = tensor + adapted[name].get_delta_weight(member).to(tensor.dtype)
        yield name, tensor.detach()
