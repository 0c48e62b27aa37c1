"""An adapter as its tensors and its configuration, the way PEFT stores them; disk and memory sync publish the same."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model_state_dict

from rltrain.ranks import full


def adapter_tensors(model: Any, member: str) -> dict[str, torch.Tensor]:
    """The PEFT model's adapter `member` under PEFT's names of a stored adapter; the trainer's own memory, detached.

    Where the model is sharded over ranks this gathers, so that all of them must call it.
    """
    # "auto" would ask a hub whether the vocabulary was resized.
    tensors = get_peft_model_state_dict(model, adapter_name=member, save_embedding_layers=False)
    return {name: full(tensor.detach()) for name, tensor in tensors.items()}


def adapter_config(model: Any, member: str) -> dict[str, Any]:
    """PEFT's own dictionary; sets become sorted lists, for json knows no sets; a regex of targets stays one string."""
    values = model.peft_config[member].to_dict()
    return {
        **{key: sorted(value) if isinstance(value, set) else value for key, value in values.items()},
        "inference_mode": True,
    }
