"""Make tiny random models of the families of base models that people fine-tune."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = 2
LLAMA = {
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
# A wrapper of an expert parameter is around the wrapper of the other.
EXPERTS = {"mlp.experts", "mlp.experts.base_layer"}
MIXTURE = {"attention": LLAMA["attention"], "mlp": EXPERTS, "experts": EXPERTS}
# The embedding has more rows than the tokenizer has tokens, as in real models.
COMMON: dict[str, Any] = {
    "vocab_size": 896,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 836,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Shorter than the tests' prompts.
WINDOW = 12


@dataclass(frozen=True)
class Family:
    """A family's configuration, and the last parts of the names in each named set of modules.

    Attributes:
        settings: of the configuration, beside COMMON; those that distinguish the family.
        renamed: COMMON's settings that the family calls otherwise, or (None) does not have.
        adapters: whether vLLM serves adapters on it, not merged weights alone.
        mixture: whether it has experts.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, set[str]] = field(default_factory=lambda: LLAMA)
    renamed: dict[str, str | None] = field(default_factory=dict)
    adapters: bool = True
    mixture: bool = False

    def config(self) -> Any:
        """Return the configuration of a tiny model."""
        names = {name: self.renamed.get(name, name) for name in COMMON}
        common = {new: COMMON[name] for name, new in names.items() if new is not None}
        return AutoConfig.for_model(self.model_type, **common | self.settings)


FAMILIES = {
    "Llama": Family("llama", {"rope_parameters": LLAMA3_ROPE}),
    # Biases on q, k and v.
    "Qwen2": Family("qwen2", {"tie_word_embeddings": True, "num_attention_heads": 2}),
    # Norms of q and k.
    "Qwen3": Family("qwen3", {"tie_word_embeddings": True}),
    "Mistral": Family("mistral", {"sliding_window": WINDOW}),
    # A window in every other layer, soft caps on scores and logits.
    "Gemma 2": Family(
        "gemma2",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "Gemma 3": Family(
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
    ),
    "Phi-3": Family(
        "phi3",
        {"sliding_window": WINDOW, "original_max_position_embeddings": 256},
        {"attention": {"qkv_proj", "o_proj"}, "mlp": {"gate_up_proj", "down_proj"}},
    ),
    # Multipliers of embeddings, residuals, scores and logits.
    "Granite": Family(
        "granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
        },
    ),
    "OLMo 2": Family("olmo2"),
    # A layer without rotary positions.
    "SmolLM3": Family("smollm3", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    # Absolute positions, weights stored as [in, out], dropout.
    "GPT-2": Family(
        "gpt2",
        {"tie_word_embeddings": True, "num_attention_heads": 2, "n_inner": 96},
        {"attention": {"c_attn", "attn.c_proj"}, "mlp": {"c_fc", "mlp.c_proj"}},
        {"head_dim": None, "intermediate_size": None, "num_key_value_heads": None},
        adapters=False,
    ),
    "Qwen3-MoE": Family(
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        MIXTURE,
        adapters=False,
        mixture=True,
    ),
    "Mixtral": Family(
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        MIXTURE,
        adapters=False,
        mixture=True,
    ),
    # Its heads are as wide as hidden / heads.
    "OLMoE": Family(
        "olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 2},
        MIXTURE,
        {"head_dim": None},
        adapters=False,
        mixture=True,
    ),
}


def write_model(family: Family, folder: Path, tokenizer_dir: Path) -> None:
    """Write a family's tiny random model into a folder, with the tokenizer of another."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Sharper than the usual initialisation, so that samples are not uniform.
            parameter.normal_(1.0 if "norm" in name or ".ln_" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_dir / name, folder / name)
