"""The registry of sync modes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.config.schema import SyncMode
from rltrain.sync.base import Sync
from rltrain.sync.disk import DiskSync, Once, run_here
from rltrain.sync.memory import MemorySync
from rltrain.sync.merge import MergeSync

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
