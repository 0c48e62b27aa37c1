"""Sync in memory: the adapter's tensors go to the engine as they are, and no file is touched."""

from __future__ import annotations

from typing import Any

from rltrain.engines.base import Engine
from rltrain.sync.adapter import AdapterTensors, adapter_config


class MemorySync:
    """Hands the adapter's tensors to the engine, under the names and with the configuration that
    disk sync writes.
    """

    def __init__(self) -> None:
        self._adapters: dict[str, AdapterTensors] = {}

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Make the engine serve `member` with the adapter of that name that the PEFT model holds
        now.
        """
        if engine.shares_weights:
            return
        known = self._adapters.get(member)
        if known is None or not known.fits(model):
            known = self._adapters[member] = AdapterTensors(model, member)
        engine.load_adapter_tensors(member, version, known.now(), adapter_config(model, member))
