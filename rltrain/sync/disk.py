"""Sync through files: the adapter in PEFT format, one directory per version, loaded by the engine
from there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from harness.records.files import whole_folder
from rltrain.engines.base import Engine
from rltrain.sync.adapter import adapter_config, adapter_tensors

# Runs what several processes that train together must do but once; the others wait for it.
Once = Callable[[Callable[[], None]], None]


def run_here(action: Callable[[], None]) -> None:
    """The one process does it."""
    action()


class DiskSync:
    """Writes `<root>/<member>/v000012/`, has the engine load it, then removes the member's other
    versions.

    The default, for it works with every engine and leaves the adapter where other programs can read
    it.
    """

    def __init__(self, root: Path, once: Once = run_here) -> None:
        self._root = root
        self._once = once

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Make the engine serve `member` with the adapter of that name that the PEFT model holds
        now.
        """
        if engine.shares_weights:
            return
        folder = self._root / member / f"v{version:06d}"
        tensors, config = adapter_tensors(model, member), adapter_config(model, member)
        # The engine reads it at once and the next step replaces it: after a crash nothing does.
        self._once(lambda: write_tensors(tensors, config, folder, sealed=False))
        engine.load_adapter(member, version, folder)
        self._once(lambda: _remove_others(folder))


def _remove_others(folder: Path) -> None:
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)


def write_adapter(model: Any, member: str, folder: Path, once: Once = run_here) -> None:
    """Write the PEFT model's adapter `member` into `folder`, as `write_tensors` does.

    Where the model is sharded over ranks all of them must call this.
    """
    tensors, config = adapter_tensors(model, member), adapter_config(model, member)
    once(lambda: write_tensors(tensors, config, folder))


def write_tensors(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], folder: Path, *, sealed: bool = True
) -> None:
    """Write an adapter (`adapter_tensors`, `adapter_config`), whole or not at all, in place of what
    was in `folder`.

    `sealed` as for `whole_folder`: with checksums, and on disk. The folder loads with plain
    `PeftModel.from_pretrained` and as a plain vLLM LoRARequest; r and alpha as trained.
    """
    with whole_folder(folder, sealed=sealed) as new:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            new / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        (new / "adapter_config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n"
        )
