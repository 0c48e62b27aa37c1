"""Load models, adapters and chat templates that carry code.

None of the code runs, and the error names the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from harness import export
from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.core.errors import UserError
from rltrain.data.files import load_examples
from rltrain.envs.problems import load_problems
from rltrain.models.loading import NO_CODE, load_base
from rltrain.tools.preflight import check_run
from tests.unit.analysis.synthetic import Trial, params, write_run

CODE = """
import pathlib
pathlib.Path({canary!r}).touch()
from transformers import Qwen2Config, Qwen2ForCausalLM
class Config(Qwen2Config):
    model_type = "theirs"
class Model(Qwen2ForCausalLM):
    config_class = Config
"""
ADAPTER = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 32,
    "target_modules": ["q_proj"],
}


class Payload:
    """Object that creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.canary), "w"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Return the path of a file that must not be created."""
    return tmp_path / "canary"


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Return a copy of the embedded model."""
    return Path(
        shutil.copytree(tiny_model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("data"))
    )


def recipe_of(model: Path) -> Recipe:
    return recipes.load("quickstart", [f"trainer.policy.model.path={model}"])


def test_the_payloads_work(canary: Path, tmp_path: Path) -> None:
    torch.save(Payload(canary), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False).close()
    assert canary.exists()


@pytest.mark.claim("A model's own code is not run")
def test_a_models_code_is_not_run_whatever_the_user_answers(
    model: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((model / "config.json").read_text())
    theirs = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "theirs", "auto_map": theirs})
    )
    (model / "theirs.py").write_text(CODE.format(canary=str(canary)))
    # By default transformers would ask on the terminal.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot load"):
        load_base(recipe_of(model))
    assert not canary.exists()


@pytest.mark.claim("A model's own code is not run")
def test_a_models_tokenizer_code_is_not_run(
    model: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": [None, "theirs.Theirs"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "theirs.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(UserError):
        load_base(recipe_of(model))
    assert not canary.exists()


@pytest.mark.claim("Nothing is unpickled")
def test_pickled_weights_are_not_unpickled(model: Path, canary: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(canary)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no weights as safetensors"):
        load_base(recipe_of(model))
    assert not canary.exists()


@pytest.mark.claim("Nothing is unpickled")
def test_a_pickled_adapter_is_not_unpickled(
    tiny_model_dir: Path, canary: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    recipe = recipes.with_values(
        recipes.read(run / "recipe.yaml"), {"trainer.policy.model.path": str(tiny_model_dir)}
    )
    (run / "recipe.yaml").write_text(recipes.to_yaml(recipe))
    for which in ("final", "best"):
        folder = run / "adapter" / which
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
        torch.save(
            {"base_model.model.x.lora_A.weight": Payload(canary)}, folder / "adapter_model.bin"
        )
        for form in ([], ["--merged"]):
            with pytest.raises(UserError):
                export.main([str(run), "--which", which, "--output", str(tmp_path / "out"), *form])
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{{ x('touch CANARY') }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% for",
    ],
)
@pytest.mark.claim("A chat template is only a template")
def test_a_chat_template_runs_no_code(model: Path, canary: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    recipe = recipe_of(model)
    tokenizer = AutoTokenizer.from_pretrained(model, **NO_CODE)
    with pytest.raises(UserError):
        load_problems(recipe, recipe.data.val_data, tokenizer)
    assert not canary.exists()


@pytest.mark.claim("A data file names its environment and no more")
def test_the_environment_of_a_data_file_is_only_imported_by_name(
    tmp_path: Path, canary: Path
) -> None:
    row = {"prompt": [{"role": "user", "content": "q"}], "reward_spec": {"ground_truth": "1"}}
    for name in (
        f"os.system('touch {canary}')",
        "../evil",
        "/tmp/evil.py",
        f"__import__('os').system('touch {canary}')",
    ):
        (tmp_path / "x.jsonl").write_text(json.dumps({**row, "env_class": name}) + "\n")
        recipe = recipes.load("quickstart", [f"data.train_data=[{tmp_path}/x.jsonl]"])
        with pytest.raises(UserError, match="environment"):
            check_run(recipe)
        assert load_examples([tmp_path / "x.jsonl"])[0].env_class == name
    assert not canary.exists()
    assert sorted(os.listdir(tmp_path)) == ["x.jsonl"]
