"""Read a GGUF file: dequantize its weights, and take its tokenizer and chat template along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from harness.core.errors import UserError
from rltrain.models.loading import NO_CODE, first_line

MAGIC = b"GGUF"


def is_gguf(file: Path) -> bool:
    """Return whether a file begins as a GGUF file does, or is named like one."""
    if file.suffix == ".gguf":
        return True
    with file.open("rb") as content:
        return content.read(len(MAGIC)) == MAGIC


def read_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Return the model of a GGUF file, dequantized to `dtype`, and its tokenizer.

    transformers reads the file. It leaves out what it has no place for, and the model would be
    another one in silence, so that is refused here. A head that equals the embedding is tied to it.
    Raises UserError for a file that is damaged, is one part of several, has an architecture that
    transformers does not read, or holds weights or position scaling that would be left out.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        names = {tensor.name for tensor in reader.tensors}
        architecture = str(reader.fields["general.architecture"].contents())
        parts = reader.fields.get("split.count")
        num_parts = int(parts.contents()) if parts is not None else 1
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            "cannot read the GGUF file",
            got=f"{file}: it is damaged or cut short ({first_line(error)})",
            fix="download it again, whole",
        ) from error
    if num_parts > 1:
        raise UserError(
            "the GGUF file is one part of several",
            got=f"{file}: {num_parts} parts",
            fix="join them first: llama.cpp's llama-gguf-split --merge",
        )
    scaling = sorted(
        key for key in reader.fields if re.search(r"\.rope\.scaling\.(?!finetuned)", key)
    )
    if scaling and architecture != "gpt-oss":
        raise UserError(
            "the GGUF file scales positions, which transformers does not read from it",
            got=f"{file}: {scaling[0]}",
            fix="use the model's safetensors",
        )
    del reader
    place: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            **place, dtype=dtype, output_loading_info=True, **NO_CODE
        )
        tokenizer = AutoTokenizer.from_pretrained(**place, **NO_CODE)
    except Exception as error:
        raise UserError(
            "cannot read the model in the GGUF file",
            got=f"{file}, architecture {architecture}: {type(error).__name__}: {first_line(error)}",
            allowed=f"architectures: {', '.join(sorted(GGUF_SUPPORTED_ARCHITECTURES))}",
            fix="use the model's safetensors",
        ) from error
    config = model.config
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    unread = names - get_gguf_hf_weights_map(model, processor).keys()
    del config.quantization_config  # what is dequantized can be saved
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = model.state_dict()
    # transformers takes a weight of any shape from the file.
    reshaped = {
        name for name, weight in plain.state_dict().items() if weight.shape != weights[name].shape
    }
    wrong = sorted(unread | reshaped | info["missing_keys"])
    if wrong:
        raise UserError(
            "the weights of the GGUF file and of the model that transformers makes of it differ",
            got=f"{file}: {len(wrong)} left out, missing or of another shape: {wrong[0]}",
            fix="use the model's safetensors",
        )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    plain.config.tie_word_embeddings = torch.equal(embedding, head)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain, tokenizer
