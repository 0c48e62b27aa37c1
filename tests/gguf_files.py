"""Write tiny models as GGUF files, as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

CONTROL, USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED


def write_gguf(
    model: PreTrainedModel,
    tokenizer_folder: Path,
    file: Path,
    *,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    eos: str = "<|im_end|>",
    template: bool = True,
    leave_out: Collection[str] = (),
    more: Mapping[str, np.ndarray[Any, Any]] | None = None,
    rope_scaling: float | None = None,
    parts: int = 1,
) -> None:
    """Write a model and its byte-level BPE tokenizer.

    Matrices are stored in `quantization`. `leave_out` and `more` are tensors by GGUF's names.
    """
    config = model.config
    architecture = config.model_type
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("a tiny model")
    for key, attribute in GGUF_CONFIG_MAPPING[architecture].items():
        value = getattr(config, attribute or "", None)
        if attribute == "rope_theta":
            value = config.rope_parameters["rope_theta"]
        if attribute == "head_dim":
            value = model.model.layers[0].self_attn.head_dim
        if isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
    if rope_scaling is not None:
        writer.add_rope_scaling_factor(rope_scaling)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    _add_tokenizer(writer, tokenizer_folder, config.vocab_size, eos, template)
    weights = model.state_dict()
    places = get_gguf_hf_weights_map(model, TensorProcessor())
    for name, weight_name in places.items():
        tied = name == "output.weight" and config.tie_word_embeddings
        if name in leave_out or tied:
            continue
        array = weights[weight_name].to(torch.float32).numpy()
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_attention_heads if "_q." in name else config.num_key_value_heads
            array = _interleaved(array, heads)
        kind = quantization if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return the rows of a projection with each head's two rotary halves interleaved."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _add_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, size: int, eos: str, template: bool
) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"]: token for token in content["added_tokens"]}
    ids = {index: text for text, index in content["model"]["vocab"].items()}
    ids |= {index: token["content"] for index, token in added.items()}
    tokens = [ids.get(index, f"[unused{index}]") for index in range(size)]
    kinds = [
        gguf.TokenType.NORMAL
        if index not in added
        else (CONTROL if added[index]["special"] else USER_DEFINED)
        for index in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_eos_token_id(tokens.index(eos))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    if template:
        writer.add_chat_template((folder / "chat_template.jinja").read_text())
