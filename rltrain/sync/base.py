"""The sync protocol."""

from __future__ import annotations

from typing import Any, Protocol

from rltrain.engines.base import Engine


class Sync(Protocol):
    """Publishes a member's weights to the engine; does nothing for an engine that shares them."""

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Make `engine` serve `member` with the weights that `model` (PEFT or plain) holds now.

        Raises SyncError where the engine would not serve every module that was trained.
        """
