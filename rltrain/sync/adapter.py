"""An adapter as its tensors and its configuration, the way PEFT stores them; disk and memory sync
publish the same.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch.distributed.tensor import DTensor

from rltrain.distributed.process_group import full


def adapter_tensors(model: Any, member: str) -> dict[str, torch.Tensor]:
    """The PEFT model's adapter `member` under PEFT's names of a stored adapter; the trainer's own
    memory, detached.

    Where the model is sharded over ranks all of them must call it: it gathers, and PEFT asks for
    the state dict of the whole model, upon which FSDP shards again what a forward pass has left
    whole.
    """
    # "auto" would ask a hub whether the vocabulary was resized.
    tensors = get_peft_model_state_dict(model, adapter_name=member, save_embedding_layers=False)
    return {name: full(tensor.detach()) for name, tensor in tensors.items()}


class AdapterTensors:
    """`adapter_tensors` of one adapter again and again: PEFT goes through the whole model each
    time, this once.

    Raises RuntimeError when a tensor of PEFT's is no parameter of the model.
    """

    def __init__(self, model: Any, member: str) -> None:
        self._member, self._config = member, model.peft_config[member]
        names = {tensor.data_ptr(): name for name, tensor in adapter_tensors(model, member).items()}
        self._places = [
            (names.pop(parameter.data_ptr()), module, leaf)
            for module in model.modules()
            for leaf, parameter in module.named_parameters(recurse=False)
            if not isinstance(parameter, DTensor) and parameter.data_ptr() in names
        ]
        if names:
            raise RuntimeError(
                f"PEFT stores what is no parameter of the model: {sorted(names.values())}"
            )

    def fits(self, model: Any) -> bool:
        """Whether it is still the same adapter, and not another put on under its name."""
        return model.peft_config.get(self._member) is self._config

    def now(self) -> dict[str, torch.Tensor]:
        """The tensors, as `adapter_tensors` gives them."""
        return {name: getattr(module, leaf).detach() for name, module, leaf in self._places}


def adapter_config(model: Any, member: str) -> dict[str, Any]:
    """PEFT's own dictionary; sets become sorted lists, for json knows no sets; a regex of targets
    stays one string.
    """
    values = model.peft_config[member].to_dict()
    return {
        **{
            key: sorted(value) if isinstance(value, set) else value for key, value in values.items()
        },
        "inference_mode": True,
    }
