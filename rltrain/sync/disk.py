"""Sync through files: the adapter in PEFT format, one directory per version, loaded by the engine from there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from rltrain.engines.base import Engine


class DiskSync:
    """Writes `<root>/<member>/v000012/`, has the engine load it, then removes the member's other versions.

    The default, for it works with every engine and leaves the adapter where other programs can read it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def publish(self, engine: Engine, model: Any, member: str, version: int) -> None:
        """Make the engine serve `member` with the adapter of that name that the PEFT model holds now."""
        if engine.shares_weights:
            return
        folder = self._root / member / f"v{version:06d}"
        write_adapter(model, member, folder)
        engine.load_adapter(member, version, folder)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)


def write_adapter(model: Any, member: str, folder: Path) -> None:
    """Write the PEFT model's adapter `member` into `folder`, whole or not at all, in place of what was there.

    The folder loads with plain `PeftModel.from_pretrained` and as a plain vLLM LoRARequest; r and alpha as trained.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        # "auto" would ask a hub whether the vocabulary was resized.
        tensors = get_peft_model_state_dict(model, adapter_name=member, save_embedding_layers=False)
        new = temporary / "new"
        new.mkdir()
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            new / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        (new / "adapter_config.json").write_text(_config_json(model.peft_config[member]))
        if folder.exists():
            os.rename(folder, temporary / "old")
        os.rename(new, folder)
    finally:
        shutil.rmtree(temporary)


def _config_json(config: Any) -> str:
    """PEFT's own dictionary; sets become sorted lists, for json knows no sets; a regex of targets stays one string."""
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps({**values, "inference_mode": True}, indent=2, sort_keys=True) + "\n"
