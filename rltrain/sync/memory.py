"""Sync in memory: the adapter's tensors go to the engine as they are, and no file is touched."""

from __future__ import annotations

from typing import Any

from rltrain.engines.base import Engine
from rltrain.sync.adapter import adapter_config, adapter_tensors


class MemorySync:
    """Hands the adapter's tensors to the engine, under the names and with the configuration that disk sync writes."""

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Make the engine serve `member` with the adapter of that name that the PEFT model holds now."""
        if not engine.shares_weights:
            engine.load_adapter_tensors(member, version, adapter_tensors(model, member), adapter_config(model, member))
