"""Models and tokenizers that cannot be used are refused when they are loaded."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from harness.config import recipe as recipes
from harness.core.errors import UserError
from harness.records.run_dir import RunDir
from rltrain.data.batch import collate
from rltrain.envs.problems import load_problems
from rltrain.models import attention
from rltrain.models.loading import load_base
from rltrain.models.logprobs import token_logprobs
from rltrain.pack import Pack
from tests.recipes import quickstart

MODEL = "trainer.policy.model.path"


def config(**values: Any) -> Callable[[Path], None]:
    """Set values in a folder's config.json."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Leave the first bytes of a file."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return change


def drop(pattern: str) -> Callable[[Path], None]:
    """Remove files."""

    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return change


def poison(name: str, value: float) -> Callable[[Path], None]:
    """Set one number of a weight."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name].view(-1)[7] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def pickled(folder: Path) -> None:
    """Keep the weights in pytorch_model.bin alone."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(
        shutil.copytree(tiny_model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("data"))
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (cut("model.safetensors", 1000), f"cannot load {MODEL}"),
        (cut("model.safetensors", 0), f"cannot load {MODEL}"),
        (drop("model.safetensors"), "no file named model.safetensors"),
        (cut("tokenizer.json", 1), f"cannot load {MODEL}"),
        (drop("tokenizer*"), "the tokenizer is not the model's"),
        (drop("chat_template.jinja"), "the tokenizer has no chat template"),
        (config(hidden_size=256), f"cannot load {MODEL}"),
        (config(num_attention_heads=0), "ZeroDivisionError"),
        (
            config(num_hidden_layers=4, layer_types=["full_attention"] * 4),
            "lacks weights of its architecture",
        ),
        (
            config(model_type="bert", architectures=["BertModel"]),
            "lacks weights of its architecture",
        ),
        (config(model_type="no_such_model"), "no_such_model"),
        (
            config(model_type="gpt_oss", architectures=["GptOssForCausalLM"]),
            "an attention that the trainer does not compute",
        ),
        (config(max_position_embeddings=64), "<= 64 together"),
        (
            poison("model.layers.1.mlp.up_proj.weight", math.nan),
            "1 of 49152 in model.layers.1.mlp.up_proj.weight",
        ),
        (poison("model.norm.weight", math.inf), "weights that are NaN or infinite"),
        (pickled, "save_pretrained"),
    ],
)
def test_a_model_that_cannot_serve_is_refused(
    model: Path, change: Callable[[Path], None], told: str
) -> None:
    recipe = quickstart([f"{MODEL}={model}"])
    load_base(recipe)
    change(model)
    with pytest.raises(UserError) as caught:
        load_base(recipe)
    assert told in str(caught.value)
    assert str(model) in str(caught.value) or "64" in told


def test_dropout_of_the_base_is_off(model: Path) -> None:
    config(attention_dropout=0.1)(model)
    recipe = quickstart([f"{MODEL}={model}"])
    base: Any
    base, _ = load_base(recipe)
    assert base.config.attention_dropout == 0
    assert {layer.self_attn.attention_dropout for layer in base.model.layers} == {0}


def test_a_window_of_attention_is_the_models_in_training_too() -> None:
    # Mistral's configuration has a window and no list of layers.
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
    )
    model: Any = MistralForCausalLM._from_config(config, attn_implementation=attention.NAME).eval()
    tokens = torch.randint(0, 32, (1, 20))
    with torch.no_grad():
        expected = (
            model(tokens).logits.log_softmax(dim=-1)[0, 9:-1].gather(1, tokens[0, 10:, None])[:, 0]
        )
    batch = collate([tokens[0, :10].tolist()], [tokens[0, 10:].tolist()], [[0.0] * 10], pad_id=0)
    with torch.no_grad():
        found = token_logprobs(model, batch, 1.0)[0]
    assert (found - expected).abs().max() < 1e-5


def test_a_tokenizer_of_another_model_is_refused(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"more{i}": 2000 + i for i in range(10)}
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the tokenizer is not the model's"):
        load_base(quickstart([f"{MODEL}={model}"]))


def test_prompts_that_are_all_too_long_or_too_few_are_counted(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    recipe = quickstart(["generator.backend=transformers", "generator.max_input_length=2"])
    _, tokenizer = load_base(recipe)
    with pytest.raises(UserError, match="every prompt is longer"):
        load_problems(recipe, recipe.data.val_data, tokenizer)
    problems, _ = load_problems(quickstart(), recipe.data.val_data, tokenizer)
    lengths = sorted(len(problem.prompt_ids) for problem in problems)
    few = recipes.with_values(
        recipe,
        {
            "generator.max_input_length": lengths[3],
            "data.train_data": recipe.data.val_data,
            "trainer.train_batch_size": 256,
            "trainer.policy_mini_batch_size": 256,
        },
    )
    pack = Pack.open(few)
    with pytest.raises(UserError, match="too few prompts are short enough"):
        pack.add(few, RunDir(tmp_path))
    pack.close()
