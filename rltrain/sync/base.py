"""The sync protocol, and the registry of sync modes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from harness.config.schema import SyncMode
from rltrain.engines.base import Engine
from rltrain.sync.disk import DiskSync, Once, run_here
from rltrain.sync.memory import MemorySync
from rltrain.sync.merge import MergeSync


class Sync(Protocol):
    """Publishes a member's weights to the engine; does nothing for an engine that shares them."""

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Make `engine` serve `member` with the weights that `model` (PEFT or plain) holds now.

        Raises SyncError where the engine would not serve every module that was trained.
        """


SYNCS: dict[SyncMode, Callable[[Path, Once], Sync]] = {
    SyncMode.disk: DiskSync,
    SyncMode.memory: lambda root, once: MemorySync(),
    SyncMode.merge: lambda root, once: MergeSync(),
}


def build_sync(mode: SyncMode, root: Path, once: Once = run_here) -> Sync:
    """Return the sync that `trainer.policy.model.lora.sync` names.

    `root` is the folder of disk sync; `once` runs an action in one of several ranks.
    """
    return SYNCS[mode](root, once)
