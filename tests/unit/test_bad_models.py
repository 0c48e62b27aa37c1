"""Models and tokenizers that cannot serve: said when they are loaded, never trained on as if they could."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import recipe as recipes
from harness.errors import UserError
from harness.rundir import RunDir
from rltrain.model import load_base
from rltrain.pack import Pack
from rltrain.problems import load_problems
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


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("data")))


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
        (config(num_hidden_layers=4, layer_types=["full_attention"] * 4), "lacks weights of its architecture"),
        (config(model_type="bert", architectures=["BertModel"]), "lacks weights of its architecture"),
        (config(model_type="no_such_model"), "no_such_model"),
        (config(max_position_embeddings=64), "<= 64 together"),
    ],
)
def test_a_model_that_cannot_serve_is_refused(model: Path, change: Callable[[Path], None], told: str) -> None:
    recipe = quickstart([f"{MODEL}={model}"])
    load_base(recipe)
    change(model)
    with pytest.raises(UserError) as caught:
        load_base(recipe)
    assert told in str(caught.value)
    assert str(model) in str(caught.value) or "64" in told


def test_a_tokenizer_of_another_model_is_refused(model: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"more{i}": 2000 + i for i in range(10)}
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the tokenizer is not the model's"):
        load_base(quickstart([f"{MODEL}={model}"]))


def test_prompts_that_are_all_too_long_or_too_few_are_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = quickstart(["generator.backend=transformers", "generator.max_input_length=2"])
    _, tokenizer = load_base(recipe)
    with pytest.raises(UserError, match="every prompt is longer"):
        load_problems(recipe, recipe.data.val_data, tokenizer)
    problems, _ = load_problems(quickstart(), recipe.data.val_data, tokenizer)
    lengths = sorted(len(problem.prompt_ids) for problem in problems)
    few = recipes.with_values(recipe, {
        "generator.max_input_length": lengths[3], "data.train_data": recipe.data.val_data,
        "trainer.train_batch_size": 256, "trainer.policy_mini_batch_size": 256,
    })  # fmt: skip
    pack = Pack.open(few)
    with pytest.raises(UserError, match="too few prompts are short enough"):
        pack.join(few, RunDir(tmp_path))
    pack.close()
