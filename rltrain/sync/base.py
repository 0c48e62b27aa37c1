"""What a sync is: it publishes a member's adapter to the engine; and the registry of sync modes."""

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
    """Publishes what the trainer has learned. An engine that shares the trainer's weights needs
    nothing published.
    """

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
    """The sync that `trainer.policy.model.lora.sync` names.

    `root` is where disk sync keeps its adapters, `once` runs what only one of several training
    processes must do.
    """
    return SYNCS[mode](root, once)
