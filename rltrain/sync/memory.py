"""Sync in memory: the engine gets the adapter's tensors, and no file is written."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rltrain.engines.base import Engine
from rltrain.sync.disk import adapter_config, adapter_tensors


class MemorySync:
    """Hands the engine the adapter's tensors and configuration, the same that disk sync writes."""

    def __init__(self) -> None:
        self._adapters: dict[str, AdapterTensors] = {}

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Make the engine serve `member` with the adapter that the PEFT model holds now."""
        if engine.shares_weights:
            return
        adapter = self._adapters.get(member)
        if adapter is None or not adapter.fits(model):
            adapter = self._adapters[member] = AdapterTensors(model, member)
        engine.load_adapter_tensors(member, version, adapter.now(), adapter_config(model, member))


class AdapterTensors:
    """`adapter_tensors` of one adapter, called repeatedly.

    PEFT searches the whole model each time; this searches once and remembers the parameters.
    Raises RuntimeError when PEFT stores a tensor that is no parameter of the model.
    """

    def __init__(self, model: Any, member: str) -> None:
        self._member, self._config = member, model.peft_config[member]
        names = {tensor.data_ptr(): name for name, tensor in adapter_tensors(model, member).items()}
        self._parameters = [
            (names.pop(parameter.data_ptr()), module, leaf)
            for module in model.modules()
            for leaf, parameter in module.named_parameters(recurse=False)
            if not isinstance(parameter, DTensor) and parameter.data_ptr() in names
        ]
        if names:
            raise RuntimeError(
                f"PEFT stores tensors that are no parameters: {sorted(names.values())}"
            )

    def fits(self, model: Any) -> bool:
        """Return whether the model still has this adapter, and not another of the same name."""
        return model.peft_config.get(self._member) is self._config

    def now(self) -> dict[str, torch.Tensor]:
        """Return the tensors' current values, as `adapter_tensors` does."""
        return {name: getattr(module, leaf).detach() for name, module, leaf in self._parameters}
