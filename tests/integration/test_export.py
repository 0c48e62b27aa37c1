"""Load exported policies in other programs: plain PEFT, plain transformers and `vllm serve`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from harness import export as command
from harness.config import recipe as recipes
from harness.config.metrics import ACCURACY
from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.core.paths import locate
from harness.records import manifest
from harness.records.files import write_json
from harness.records.run_dir import RunDir
from rltrain.data.files import load_examples
from rltrain.tools import export
from rltrain.trainer import Trainer
from tests.integration.training import train
from tests.integration.vllm_server import ask, serving
from tests.recipes import quickstart

Chat = list[dict[str, str]]
MAX_TOKENS = 48


@dataclass(frozen=True)
class Trained:
    """A short run, and the log-probabilities `[T]` of `tokens` under its policy and its base."""

    run: RunDir
    recipe: Recipe
    tokens: torch.Tensor
    logprobs: torch.Tensor
    base: torch.Tensor

    @property
    def base_dir(self) -> str:
        """Return the base model's folder."""
        return str(locate(self.recipe.trainer.policy.model.path))


@torch.no_grad()
def _logprobs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens[1:, None]).squeeze(-1)


def _train(folder: Path, small_data: list[str], *overrides: str) -> Trained:
    recipe = quickstart([*small_data, *overrides])
    recipe.sweep = None
    run = RunDir(folder)
    run.create(
        recipes.to_yaml(recipe),
        manifest.build(recipe, kind="run", name=folder.name, source="quickstart"),
    )
    trainer = Trainer(recipe)
    pack = trainer.pack
    chat = [
        *load_examples(recipe.data.val_data)[0].prompt,
        {"role": "assistant", "content": "3+4=7\n#### 7"},
    ]
    tokens = pack.tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)[0]
    base = _logprobs(pack.model, tokens)
    for _ in train(trainer, recipe, run):
        pass
    pack.members[0].policy.activate()  # the policy, not the critic
    trained = Trained(run, recipe, tokens, _logprobs(pack.model.eval(), tokens), base)
    trainer.close()
    return trained


@pytest.fixture(scope="module")
def trained(small_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train LoRA for a few steps, at a rate that moves the policy well away from its base."""
    return _train(
        tmp_path_factory.mktemp("runs") / "lora",
        small_data,
        "trainer.policy.optimizer_config.lr=3e-3",
    )


@pytest.fixture
def exported(trained: Trained, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that runs the command with some options and returns its output folder."""

    def make(*options: str, run: RunDir = trained.run, name: str = "exported") -> Path:
        folder = tmp_path / name
        assert command.main([str(run.path), "--output", str(folder), *options]) == 0
        assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
        return folder

    return make


def test_the_adapter_in_plain_peft_equals_the_trainers(
    trained: Trained, exported: Callable[..., Path]
) -> None:
    folder = exported()
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named).is_absolute()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), folder).eval()
    assert (trained.logprobs - trained.base).abs().max() > 0.1
    torch.testing.assert_close(
        _logprobs(model, trained.tokens), trained.logprobs, atol=1e-6, rtol=0
    )
    _assert_tokenizer_of(folder, trained.base_dir)


def test_the_merged_model_in_plain_transformers_equals_the_trainers(
    trained: Trained, exported: Callable[..., Path]
) -> None:
    folder = exported("--merged")
    assert not list(folder.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert model.dtype is torch.float32
    torch.testing.assert_close(
        _logprobs(model, trained.tokens), trained.logprobs, atol=1e-5, rtol=1e-5
    )
    base = trained.base_dir
    _assert_tokenizer_of(folder, base)
    exported_config, base_config = (
        GenerationConfig.from_pretrained(path).to_dict() for path in (folder, base)
    )
    assert exported_config == base_config


def _assert_tokenizer_of(folder: Path, base: str) -> None:
    exported, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    chat = [{"role": "user", "content": "Ann's 12 pens cost $3.50 — each?"}]
    assert exported.chat_template == original.chat_template
    assert exported.apply_chat_template(chat) == original.apply_chat_template(chat)
    assert (exported.eos_token_id, exported.pad_token_id) == (
        original.eos_token_id,
        original.pad_token_id,
    )


def test_the_card_says_that_the_inputs_changed(
    trained: Trained, exported: Callable[..., Path]
) -> None:
    whole = trained.run.manifest.read_text()
    entry = {"different": ["data x: one -> two"], "inputs": {"step": 2}}
    trained.run.update(resumed=[{"different": ["python: 3.10 -> 3.11"]}, entry])
    try:
        assert (
            "| changed inputs | after step 2: `data x: one -> two` |"
            in (exported() / "README.md").read_text()
        )
    finally:
        trained.run.manifest.write_text(whole)


def test_the_card_describes_the_model(trained: Trained, exported: Callable[..., Path]) -> None:
    card = (exported() / "README.md").read_text()
    record = trained.run.read_manifest()
    assert record["recipe"]["digest"] in card
    assert record["model"]["digest"] in card
    result = record["result"]
    accuracy, base = result["metrics"][ACCURACY], result["base"][ACCURACY]
    assert f"| held-out accuracy | {accuracy:.3f} (base {base:.3f}) |" in card
    assert "| policy | final: step 4, of a run that is COMPLETE |" in card
    assert "--enable-lora --max-lora-rank 8 --lora-modules noregret=FOLDER" in card


def test_best_exports_the_adapter_of_the_best_evaluation(
    trained: Trained, exported: Callable[..., Path]
) -> None:
    folder = exported("--which", "best")
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (trained.run.adapter / "best" / name).read_bytes()
    best = trained.run.read_manifest()["result"]["best"]
    card = (folder / "README.md").read_text()
    assert f"best: step {best['step']}" in card
    assert f"| held-out accuracy | {best[ACCURACY]:.3f} " in card


def test_full_fine_tuning_gives_a_plain_model(
    small_data: list[str], tmp_path: Path, exported: Callable[..., Path]
) -> None:
    full = _train(
        tmp_path / "full",
        small_data,
        "trainer.policy.model.lora.rank=0",
        "trainer.policy.model.lora.sync=merge",
        "trainer.max_steps=1",
        "trainer.policy.optimizer_config.lr=1e-3",
    )
    folder = exported(run=full.run)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (full.logprobs - full.base).abs().max() > 0.01
    torch.testing.assert_close(_logprobs(model, full.tokens), full.logprobs, atol=1e-6, rtol=0)
    _assert_tokenizer_of(folder, full.base_dir)
    assert "LoRA" not in (folder / "README.md").read_text()


def test_a_ppo_policy_is_exported_without_its_critic(
    small_data: list[str], tmp_path: Path, exported: Callable[..., Path]
) -> None:
    ppo = _train(
        tmp_path / "ppo",
        small_data,
        "trainer.algorithm.advantage_estimator=gae",
        "trainer.max_steps=1",
        "trainer.policy.optimizer_config.lr=1e-2",
        "trainer.critic.optimizer_config.lr=1e-2",
    )
    for options in ([], ["--merged"]):
        folder = exported(*options, run=ppo.run, name=f"exported{len(options)}")
        assert not any("critic" in path.name for path in folder.iterdir())
        model = AutoModelForCausalLM.from_pretrained(folder if options else ppo.base_dir)
        model = model if options else PeftModel.from_pretrained(model, folder)
        assert (ppo.logprobs - ppo.base).abs().max() > 0.01
        torch.testing.assert_close(
            _logprobs(model.eval(), ppo.tokens), ppo.logprobs, atol=1e-5, rtol=1e-5
        )


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning")
def test_an_adapter_on_a_tied_head_is_exported_but_not_merged(
    small_data: list[str], tmp_path: Path, exported: Callable[..., Path]
) -> None:
    targets = ["trainer.target_modules=[lm_head,q_proj]", "trainer.max_steps=1"]
    tied = _train(
        tmp_path / "tied", small_data, *targets, "trainer.policy.optimizer_config.lr=1e-2"
    )
    with pytest.raises(UserError, match=r"cannot be merged\n.*lm_head\n.*leave out --merged"):
        exported("--merged", run=tied.run)
    base = AutoModelForCausalLM.from_pretrained(tied.base_dir)
    model = PeftModel.from_pretrained(base, exported(run=tied.run)).eval()
    assert (tied.logprobs - tied.base).abs().max() > 0.01
    torch.testing.assert_close(_logprobs(model, tied.tokens), tied.logprobs, atol=1e-6, rtol=0)


def test_merged_weights_have_the_dtype_of_the_base(
    trained: Trained, tmp_path: Path, exported: Callable[..., Path]
) -> None:
    path = trained.base_dir
    small = tmp_path / "bfloat16"
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(small)
    AutoTokenizer.from_pretrained(path).save_pretrained(small)
    model = AutoModelForCausalLM.from_pretrained(
        exported("--merged", run=_on_base(trained, small)), dtype="auto"
    )
    assert model.dtype is torch.bfloat16
    gap = (_logprobs(model.eval(), trained.tokens) - trained.logprobs).abs()
    assert gap.mean() < 0.1 * (trained.logprobs - trained.base).abs().mean()


def _on_base(trained: Trained, base: Path) -> RunDir:
    """Return a copy of the trained run whose recipe names another base."""
    recipe = recipes.with_values(trained.recipe, {"trainer.policy.model.path": str(base)})
    run = RunDir(base.with_name(f"run-{base.name}"))
    shutil.copytree(trained.run.path, run.path)
    run.recipe.write_text(recipes.to_yaml(recipe))
    rebuilt = manifest.build(recipe, kind="run", name="run", source="quickstart")
    write_json(
        run.manifest,
        {**trained.run.read_manifest(), "recipe": rebuilt["recipe"], "model": rebuilt["model"]},
    )
    return run


def test_another_base_than_the_trained_one_is_refused(
    trained: Trained, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model_dir.iterdir():
        if file.is_file():
            shutil.copy(file, base)
    run = _on_base(trained, base)
    export.plan(run.path, tmp_path / "out")
    (base / "model.safetensors").write_bytes(
        (base / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\1"
    )
    with pytest.raises(UserError, match="changed since the run"):
        export.plan(run.path, tmp_path / "out")
    shutil.rmtree(base)
    with pytest.raises(UserError, match="base model is gone"):
        export.plan(run.path, tmp_path / "out")


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_a_failed_export_leaves_no_files(
    trained: Trained, tmp_path: Path, options: list[str]
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained.run.path, run.path)
    damaged = (
        run.adapter / "final" / ("adapter_model.safetensors" if options else "adapter_config.json")
    )
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"final is damaged\n.*{damaged.name} is damaged"):
        command.main([str(run.path), "--output", str(tmp_path / "out"), *options])
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.timeout(420)
@pytest.mark.parametrize("served", ["adapter", pytest.param("merged", marks=pytest.mark.slow)])
def test_vllm_serve_answers_as_the_policy(
    trained: Trained,
    exported: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    served: str,
) -> None:
    merged, adapter = exported("--merged", name="merged"), exported(name="adapter")
    chats = [example.prompt for example in load_examples(trained.recipe.data.val_data)]
    prompt, ids, greedy = _differing_prompt(merged, trained.base_dir, chats)
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"noregret={adapter}"]
    folder, name, options = {
        "adapter": (Path(trained.base_dir), "noregret", lora),
        "merged": (merged, str(merged), []),
    }[served]
    with serving(folder, tmp_path_factory.mktemp("served"), *options) as server:
        server.wait_until_up()
        answer = ask(server, name, prompt, max_tokens=MAX_TOKENS)
        assert answer["prompt_token_ids"] == ids
        assert answer["choices"][0]["token_ids"] == greedy
    assert not server.alive()


def _differing_prompt(
    policy: Path, base: str, prompts: list[Chat]
) -> tuple[Chat, list[int], list[int]]:
    """Return a prompt that the policy and its base answer differently.

    The result is the chat, its tokens, and the tokens of the policy's greedy answer.
    """
    tokenizer = AutoTokenizer.from_pretrained(policy)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (policy, base)]
    for prompt in prompts:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        answers = [
            model.generate(ids, do_sample=False, max_new_tokens=MAX_TOKENS)[0].tolist()
            for model in models
        ]
        if answers[0] != answers[1]:
            return prompt, ids[0].tolist(), answers[0][ids.shape[1] :]
    raise AssertionError("training did not change any answer")
