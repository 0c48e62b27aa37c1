"""Write random models in the shapes of published ones, and data for them.

Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.core.paths import PROJECT

TINY_GSM = PROJECT / "rltrain" / "assets" / "tiny_gsm"
ENVIRONMENT = "tests.gpu.environment"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder of the Qwen family with tied input and output embeddings."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = 151_936
    max_position_embeddings: int = 32_768


QWEN25_05B = Shape("qwen2", 896, 4864, 24, 14, 2, 64)
QWEN3_06B = Shape("qwen3", 1024, 3072, 28, 16, 8, 128)
QWEN3_4B = Shape("qwen3", 2560, 9728, 36, 32, 8, 128)


def tiny(shape: Shape) -> Shape:
    """Return a shape of the same kind that a CPU trains in a fraction of a second."""
    return replace(
        shape,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=1024,
    )


def write_model(folder: Path, shape: Shape, device: str, seed: int = 0) -> Path:
    """Write a bfloat16 model of that shape with tiny_gsm's tokenizer, unless it exists.

    Weights are sampled on `device`.
    """
    if folder.exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    new.mkdir(parents=True)
    tokens = json.loads((TINY_GSM / "config.json").read_text())
    sizes = {name: getattr(shape, name) for name in shape.__slots__ if name != "model_type"}
    config = AutoConfig.for_model(
        shape.model_type,
        **sizes,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=tokens["eos_token_id"],
        pad_token_id=tokens["pad_token_id"],
    )
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(new)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_GSM / name, new / name)
    return new.replace(folder)


def write_problems(folder: Path, tokens: int, rows: int = 1024, seed: int = 0) -> Path:
    """Write problems whose prompts have exactly `tokens` tokens, unless they exist.

    tiny_gsm's chat template is included.
    """
    path = folder / f"prompts{tokens}.jsonl"
    if path.exists():
        return path
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(TINY_GSM)

    def length(text: str) -> int:
        chat = [{"role": "user", "content": text}]
        return len(
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        )

    draw = random.Random(seed)
    missing = tokens - length("")
    # A digit is one token for this tokenizer, and digits give as many different prompts as needed.
    texts = ["".join(draw.choice("0123456789") for _ in range(missing)) for _ in range(rows)]
    if wrong := {length(text) for text in texts[:8]} - {tokens}:
        raise RuntimeError(f"prompts of {tokens} tokens were wanted, and some have {sorted(wrong)}")
    lines = [
        {
            "prompt": [{"role": "user", "content": text}],
            "env_class": ENVIRONMENT,
            "reward_spec": {"ground_truth": "0"},
        }
        for text in texts
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
