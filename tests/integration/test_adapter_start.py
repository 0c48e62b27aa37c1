"""Test runs that start from an adapter, on the real model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from harness.core.errors import UserError
from harness.records import manifest
from harness.records.run_dir import RunDir
from rltrain.models.adapter_start import LORA, with_adapter, with_copy
from rltrain.models.loading import adapter_layers
from rltrain.rollout import sample_rollouts
from rltrain.tools.preflight import check_run
from rltrain.trainer import Trainer
from tests.integration.training import MakeRecipe, MakeRun, assert_equal, rows, train, train_run

KEY = "trainer.policy.model.lora.adapter_path"
ONE_UPDATE = ("trainer.policy_mini_batch_size=4", "trainer.micro_train_batch_size_per_gpu=null")
KL = ("trainer.algorithm.use_kl_loss=true", "trainer.algorithm.kl_loss_coef=0.1")
FROM_START = "trainer.reference=start"
SLOW = pytest.mark.slow
FAST = "trainer.policy.optimizer_config.lr=3e-3"


@pytest.fixture
def source(small_recipe: MakeRecipe, new_run: MakeRun) -> RunDir:
    """Train a run of rank 4 whose adapter other runs start from."""
    recipe = small_recipe(f"{LORA}.rank=4", f"{LORA}.alpha=8", FAST)
    run = new_run(recipe, "source")
    train_run(recipe, run)
    return run


@pytest.fixture
def foreign(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Write an adapter with plain PEFT, in bfloat16, with other modules, rank and scale."""
    return write_foreign(tiny_model_dir, tmp_path / "foreign")


def write_foreign(model: Path, folder: Path, **settings: Any) -> Path:
    """Write an adapter with plain PEFT, its B not zero."""
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings},
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(5)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".lora_" in name:
                if "lora_B" in name:
                    parameter.normal_(0, 0.02)
                parameter.data = parameter.data.bfloat16()
    peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


def started(make: MakeRecipe, path: Path, *overrides: str) -> Any:
    """Compose a small recipe that starts from an adapter."""
    defaults = (f"{LORA}.rank=32", f"{LORA}.alpha=32")
    return with_adapter(make(*defaults, f"{KEY}={path}", *overrides), {})


@pytest.mark.parametrize(
    "part", ["", "checkpoints/step_000004", pytest.param("adapter/final", marks=SLOW)]
)
def test_a_run_starts_at_the_score_of_the_run_that_it_starts_from(
    source: RunDir, small_recipe: MakeRecipe, new_run: MakeRun, part: str
) -> None:
    recipe = started(small_recipe, source.path / part)
    lora = recipe.trainer.policy.model.lora
    assert (lora.rank, lora.alpha) == (4, 8)
    run = new_run(recipe, "run")
    train_run(recipe, run, stop_after=1)
    (first,), last = rows(run), rows(source)[-1]
    assert first["step"] == 0
    of_evaluation = {name: value for name, value in last.items() if name.startswith("eval/")}
    assert {name: first[name] for name in of_evaluation} == of_evaluation
    assert first["lora/norm_B"] == last["lora/norm_B"] > 0
    completions, of_source, of_base = (
        pd.read_parquet(directory.eval_samples(step))["completion"].tolist()
        for directory, step in ((run, 0), (source, 4), (source, 0))
    )
    assert completions == of_source != of_base


@pytest.mark.parametrize("where", ["use_kl_loss", pytest.param("use_kl_in_reward", marks=SLOW)])
def test_kl_to_the_start_is_zero_at_the_first_step_and_to_the_base_is_not(
    source: RunDir, small_recipe: MakeRecipe, new_run: MakeRun, where: str
) -> None:
    gaps = {}
    for reference in ("start", "base"):
        settings = (
            *ONE_UPDATE,
            f"trainer.algorithm.{where}=true",
            f"trainer.reference={reference}",
        )
        recipe = started(small_recipe, source.path, *settings)
        run = new_run(recipe, reference)
        with Trainer(recipe) as trainer:
            trainer.add(recipe, run)
            (member,) = trainer.pack.members
            ((rollout, _),) = sample_rollouts(trainer.pack, [member]).values()
            batch = rollout.to_batch(trainer.pack.pad_id)
            member.policy.activate()
            now, then = member.policy.logprobs(batch), member.policy.reference_logprobs(batch)
            gaps[reference] = float((now - then).detach().abs().max())
            assert all(p.requires_grad for p in member.policy.parameters.values())
            outcome = trainer.step([run])[run.path]
            assert not isinstance(outcome, Exception)
            if where == "use_kl_loss":
                gaps[f"{reference} kl"] = outcome.metrics["kl"]
    assert gaps["start"] == 0
    assert gaps["base"] > 0.01
    if where == "use_kl_loss":
        assert abs(gaps["start kl"]) < 1e-9 < gaps["base kl"]


@pytest.mark.parametrize(
    "fate", ["changed", *(pytest.param(fate, marks=SLOW) for fate in ("kept", "deleted"))]
)
def test_a_resumed_run_equals_an_uninterrupted_one_whatever_became_of_the_adapter(
    source: RunDir, small_recipe: MakeRecipe, new_run: MakeRun, tmp_path: Path, fate: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(source.adapter / "final", adapter)
    recipe = started(small_recipe, adapter, *KL, FROM_START, FAST)
    whole, stopped = new_run(recipe, "whole"), new_run(recipe, "stopped")
    train_run(recipe, whole)
    train_run(recipe, stopped, stop_after=4)
    if fate != "kept":
        shutil.rmtree(adapter)
    if fate == "changed":
        shutil.copytree(source.adapter / "best", adapter)
        (adapter / "adapter_config.json").write_text("{}")
    check_run(with_copy(recipe, stopped))
    train_run(recipe, stopped)
    assert_equal(whole, stopped)


def test_a_changed_adapter_is_noticed_and_a_run_without_a_copy_refuses_it(
    source: RunDir, small_recipe: MakeRecipe, new_run: MakeRun, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(source.adapter / "final", adapter)
    recipe = started(small_recipe, adapter)
    run = new_run(recipe, "run")
    record = run.read_manifest()
    assert record["adapter"]["digest"].startswith("sha256:")
    with (adapter / "adapter_config.json").open("a") as file:
        file.write("\n")
    now = manifest.build(recipe, kind="run", name="run", source="test")
    (difference,) = manifest.compare(record, now).different
    assert difference.what == f"adapter {adapter}"
    assert not manifest.changed_inputs(record)
    assert manifest.changed_inputs({**record, "kind": "sweep"}) == [difference]
    with pytest.raises(UserError, match="not what it was when the run was made"):
        train_run(recipe, run)


@SLOW
def test_a_damaged_copy_is_made_again_from_the_adapter(
    source: RunDir, small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = started(small_recipe, source.path, *KL, FROM_START)
    whole, run = new_run(recipe, "whole"), new_run(recipe, "run")
    train_run(recipe, whole)
    train_run(recipe, run, stop_after=4)
    (run.start_adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    train_run(recipe, run)
    assert_equal(whole, run)
    assert (run.aside / "start").is_dir()


def test_members_that_start_from_different_adapters_train_as_alone(
    source: RunDir, foreign: Path, small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    shared = "generator.max_lora_rank=8"
    recipes = [
        started(small_recipe, source.path, *KL, FROM_START, shared),
        started(small_recipe, foreign, *KL, FROM_START, shared, "seed=2"),
        small_recipe(f"{LORA}.rank=8", shared, *KL),
    ]
    assert [recipe.trainer.policy.model.lora.rank for recipe in recipes] == [4, 2, 8]
    together = [new_run(recipe, f"together{i}") for i, recipe in enumerate(recipes)]
    with Trainer(recipes[0], slots=3) as trainer:
        for recipe, run in zip(recipes, together, strict=True):
            trainer.add(recipe, run)
        for _ in range(4):
            outcomes = trainer.step(together)
            assert not any(isinstance(outcome, Exception) for outcome in outcomes.values())
        trainer.remove(together[0])
        names = set(trainer.pack.model.peft_config)
        assert names == {"member1", "member1_start", "member2"}
    for i, recipe in enumerate(recipes):
        alone = new_run(recipe, f"alone{i}")
        train_run(recipe, alone)
        assert_equal(alone, together[i])
    first = [pd.read_parquet(run.eval_samples(0))["completion"].tolist() for run in together]
    assert first[0] != first[2] != first[1]


def test_an_adapter_of_plain_peft_starts_with_plain_pefts_log_probabilities(
    foreign: Path, tiny_model_dir: Path, small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = started(small_recipe, foreign)
    lora = recipe.trainer.policy.model.lora
    assert (lora.rank, lora.alpha, sorted(lora.target_modules)) == (2, 6, ["down_proj", "q_proj"])
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), foreign
    ).eval()
    with Trainer(recipe) as trainer:
        trainer.add(recipe, new_run(recipe, "run"))
        (member,) = trainer.pack.members
        ((rollout, _),) = sample_rollouts(trainer.pack, [member]).values()
        ours = member.policy.logprobs(rollout.to_batch(trainer.pack.pad_id)).detach()
        samples, at = rollout.flat_samples, 0
        for problem in rollout.problems:
            for _ in range(rollout.rewards.shape[1]):
                sample, prompt = samples[at], problem.prompt_ids
                with torch.no_grad():
                    ids = torch.tensor([[*prompt, *sample.token_ids]])
                    logits = plain(input_ids=ids).logits[0, len(prompt) - 1 : -1]
                chosen = torch.tensor(sample.token_ids)[:, None]
                expected = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
                torch.testing.assert_close(
                    ours[at, : len(expected)], expected, atol=2e-5, rtol=1e-5
                )
                at += 1


@pytest.mark.parametrize("rank", [4, pytest.param(1, marks=SLOW)])
def test_rslora_keeps_its_scale_at_a_square_rank(
    rank: int, tiny_model_dir: Path, small_recipe: MakeRecipe, new_run: MakeRun, tmp_path: Path
) -> None:
    folder = write_foreign(tiny_model_dir, tmp_path / "rs", r=rank, use_rslora=True)
    recipe = started(small_recipe, folder)
    with Trainer(recipe) as trainer:
        trainer.add(recipe, new_run(recipe, "run"))
        scales = {
            layer.scaling["member0"]
            for layer in adapter_layers(trainer.pack.model, "member0").values()
        }
    assert scales == {6 / rank**0.5}


def test_ppo_starts_its_policy_from_the_adapter_and_its_critic_afresh(
    foreign: Path, small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = started(
        small_recipe,
        foreign,
        "trainer.algorithm.advantage_estimator=gae",
        "trainer.max_steps=2",
        *KL,
        FROM_START,
    )
    run = new_run(recipe, "run")
    with Trainer(recipe) as trainer:
        reports = train(trainer, recipe, run)
        next(reports)
        (member,) = trainer.pack.members
        assert member.critic is not None
        b = [p for name, p in member.critic.parameters.items() if "lora_B" in name]
        assert len(b) > len([n for n in member.policy.parameters if "lora_B" in n])
        assert not any(p.any() for p in b)
        assert [report.step for report in reports] == [1, 2]
    config = json.loads((run.adapter / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
