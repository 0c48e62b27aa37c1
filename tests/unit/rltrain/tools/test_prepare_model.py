"""Model folders made from GGUF files and from other folders, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from harness.config.recipe import load
from harness.core.errors import UserError
from harness.prepare import main
from rltrain.engines.base import stop_token_ids
from rltrain.models.loading import load_base
from rltrain.tools.prepare_model import prepare_model
from tests.gguf_files import write_gguf

SIZES: dict[str, Any] = {
    "vocab_size": 848,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tiny(architecture: str = "qwen2", *, tied: bool = True, head_dim: int = 32) -> PreTrainedModel:
    """Return a tiny random model with every weight away from its initial value."""
    torch.manual_seed(0)
    sizes = {**SIZES, "head_dim": head_dim}
    config = CONFIGS[architecture](**sizes, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


def logits(model: Any) -> torch.Tensor:
    """Return a model's logits for some tokens."""
    with torch.no_grad():
        return model(torch.arange(5, 45).reshape(2, 20)).logits


def loaded(folder: Path) -> Any:
    """Return a prepared folder's model as plain transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars() -> None:
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_the_model_it_was_made_from(
    architecture: str, tied: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    # A file of Qwen3 does not tell transformers a head's size: it takes 128.
    model = tiny(architecture, tied=tied, head_dim=128 if architecture == "qwen3" else 32)
    write_gguf(model, tiny_model_dir, tmp_path / "model.gguf")
    prepared = prepare_model(str(tmp_path / "model.gguf"), tmp_path / "out")
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(model))
    assert (prepared.architecture, prepared.dtype) == (type(model).__name__, "float32")
    assert (prepared.tied, prepared.parameters) == (tied, model.num_parameters())
    assert prepared.stop_tokens == ("<|im_end|>",)


def test_the_conversation_and_its_end_survive(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_gguf(tiny(), tiny_model_dir, tmp_path / "model.gguf", eos="<|endoftext|>")
    prepared = prepare_model(str(tmp_path / "model.gguf"), tmp_path / "out")
    chat = [{"role": "user", "content": "Ann has 17 pens.\nHow many?"}]
    before, after = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        for folder in (tiny_model_dir, tmp_path / "out")
    )
    assert before == after
    # The file names another token as its end of sequence than the template ends a turn with.
    assert set(prepared.stop_tokens) == {"<|im_end|>", "<|endoftext|>"}
    recipe = load("quickstart", [f"trainer.policy.model.path={tmp_path / 'out'}"])
    assert stop_token_ids(*load_base(recipe)) == (836, 837)


def test_quantized_weights_are_close_and_fit_bfloat16(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(model, tiny_model_dir, tmp_path / "model.gguf", quantization=kind)
    for dtype in ("float32", "bfloat16"):
        prepared = prepare_model(str(tmp_path / "model.gguf"), tmp_path / dtype, dtype)
        assert prepared.dtype == dtype
        weight = loaded(tmp_path / dtype).state_dict()["model.layers.1.mlp.up_proj.weight"]
        assert str(weight.dtype) == f"torch.{dtype}"
        expected = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
        torch.testing.assert_close(weight.float(), expected, atol=0.005, rtol=0.01)


def test_a_head_that_repeats_the_embedding_is_tied(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tiny(tied=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    write_gguf(model, tiny_model_dir, tmp_path / "model.gguf")
    prepared = prepare_model(str(tmp_path / "model.gguf"), tmp_path / "out")
    assert prepared.tied
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(model))


def test_a_folder_is_copied_with_its_dtype(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", str(tiny_model_dir), "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "Qwen2ForCausalLM, 748,544 parameters in float32, head tied to the embedding" in told
    assert "completions end with <|im_end|>" in told
    assert "What is the capital of France?" in told
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(loaded(tiny_model_dir)))
    arguments = ["--dtype", "bfloat16", "--output", str(tmp_path / "half")]
    assert main(["model", str(tmp_path / "out"), *arguments]) == 0
    assert loaded(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"template": False}, "no chat template"),
        ({"parts": 3}, "one part of several"),
        ({"rope_scaling": 4.0}, "scales positions"),
        ({"more": {"rope_freqs.weight": np.ones(16, dtype=np.float32)}}, "rope_freqs.weight"),
        ({"leave_out": ["blk.1.ffn_up.weight"]}, "1 left out.*model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_file_that_would_become_another_model_is_refused(
    written: dict[str, Any], message: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    write_gguf(tiny(), tiny_model_dir, tmp_path / "model.gguf", **written)
    assert_refused(tmp_path, str(tmp_path / "model.gguf"), message)


def test_a_head_size_that_transformers_does_not_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    write_gguf(tiny("qwen3"), tiny_model_dir, tmp_path / "model.gguf")
    assert_refused(tmp_path, str(tmp_path / "model.gguf"), "of another shape: .*layers.0.self_attn")


def test_an_architecture_that_transformers_does_not_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv6")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = "architecture rwkv6: .* not supported .* allowed: architectures: .*llama.*qwen3"
    assert_refused(tmp_path, str(tmp_path / "model.gguf"), message)


@pytest.mark.parametrize("kept", [2, 20, 3000, -5000])
def test_a_truncated_file(kept: int, tiny_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(tiny(), tiny_model_dir, file)
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(tmp_path, str(file), f"cannot read the GGUF file.*{file}.*fix: +download it")


def test_weights_that_are_not_finite(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = torch.nan
    write_gguf(model, tiny_model_dir, tmp_path / "model.gguf")
    assert_refused(tmp_path, str(tmp_path / "model.gguf"), "NaN or infinite")


def test_sources_that_are_no_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    assert_refused(tmp_path, str(tmp_path / "notes.txt"), "is no model.*allowed: a GGUF file")
    write_gguf(tiny(), tiny_model_dir, tmp_path / "model.gguf")
    assert_refused(tmp_path, str(tmp_path), f"name one of them: {tmp_path / 'model.gguf'}")
    assert_refused(tmp_path, str(tmp_path / "absent"), "cannot load the source")
    folder = tmp_path / "folder"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("data"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (folder / "generation_config.json").unlink()
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", ""))
    assert_refused(tmp_path, str(folder), "nothing ends a completion")


def test_an_output_that_exists_is_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        prepare_model(str(tiny_model_dir), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def assert_refused(folder: Path, source: str, message: str) -> None:
    """Assert that a source is refused, and that nothing is left of the output."""
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=f"(?s){message}"):
        prepare_model(source, folder / "out")
    assert sorted(folder.iterdir()) == before
