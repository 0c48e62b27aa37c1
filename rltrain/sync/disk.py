"""Sync through files: one PEFT folder per adapter version, which the engine loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from harness.records.files import whole_folder
from rltrain.distributed.process_group import full
from rltrain.engines.base import Engine

Once = Callable[[Callable[[], None]], None]
"""Runs an action in one of several ranks while the others wait for it."""


def run_here(action: Callable[[], None]) -> None:
    """Run the action: the `Once` of a single process."""
    action()


def adapter_tensors(model: Any, member: str) -> dict[str, torch.Tensor]:
    """Return the PEFT model's adapter `member` under the names of a stored adapter.

    The tensors are detached and share the trainer's memory. All ranks must call this where the
    model is sharded: it gathers, and PEFT asks for the state dict of the whole model, upon which
    FSDP reshards parameters that a forward pass has left gathered.
    """
    # "auto" would ask a hub whether the vocabulary was resized.
    tensors = get_peft_model_state_dict(model, adapter_name=member, save_embedding_layers=False)
    return {name: full(tensor.detach()) for name, tensor in tensors.items()}


def adapter_config(model: Any, member: str) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter as JSON values: sets become sorted lists."""
    config = model.peft_config[member].to_dict().items()
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config}
    return values | {"inference_mode": True}


class DiskSync:
    """Writes `<root>/<member>/v000012/`, has the engine load it, then removes older versions.

    The default: it works with every engine, and other programs can read the adapter.
    """

    def __init__(self, root: Path, once: Once = run_here) -> None:
        self._root = root
        self._once = once

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Make the engine serve `member` with the adapter that the PEFT model holds now."""
        if engine.shares_weights:
            return
        folder = self._root / member / f"v{version:06d}"
        tensors, config = adapter_tensors(model, member), adapter_config(model, member)
        # Unsealed: the engine reads the folder at once, and after a crash nothing does.
        self._once(lambda: write_tensors(tensors, config, folder, sealed=False))
        engine.load_adapter(member, version, folder)
        self._once(lambda: _remove_others(folder))


def _remove_others(folder: Path) -> None:
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)


def write_adapter(model: Any, member: str, folder: Path, once: Once = run_here) -> None:
    """Write the PEFT model's adapter `member` into `folder`, as `write_tensors` does.

    All ranks must call this where the model is sharded.
    """
    tensors, config = adapter_tensors(model, member), adapter_config(model, member)
    once(lambda: write_tensors(tensors, config, folder))


def write_tensors(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], folder: Path, *, sealed: bool = True
) -> None:
    """Write an adapter's tensors and configuration into `folder`, atomically.

    The folder loads with plain `PeftModel.from_pretrained` and as a plain vLLM LoRARequest; r and
    alpha are those of training. `sealed` is as for `whole_folder`: with checksums, and flushed.
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
