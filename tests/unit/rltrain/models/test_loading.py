"""Log-probabilities, references and adapter statistics on a tiny random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import Qwen2Config, Qwen2ForCausalLM

from rltrain.data.batch import Batch, collate
from rltrain.models.loading import adapter_statistics, add_adapter, lora_config
from rltrain.models.logprobs import AdapterOff, token_logprobs, token_logprobs_and_entropy
from rltrain.pack import _adapter_seed
from tests.recipes import quickstart


def test_cudnns_attention_is_off() -> None:
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture
def base() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def adapted(base: Qwen2ForCausalLM) -> PeftModel:
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"), "member0"
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def batch() -> Batch:
    prompts, completions = [[5, 6, 7], [8], [9, 10]], [[1, 2], [3, 4, 9, 11], [12]]
    return collate(prompts, completions, [[0.0] * len(c) for c in completions], pad_id=0)


def test_logprobs_equal_those_of_each_sequence_alone(base: Qwen2ForCausalLM, batch: Batch) -> None:
    temperature = 0.7
    with torch.no_grad():
        together, entropy = token_logprobs_and_entropy(base, batch, temperature)
        for row, (prompt, completion) in enumerate(
            [([5, 6, 7], [1, 2]), ([8], [3, 4, 9, 11]), ([9, 10], [12])]
        ):
            logits = (
                base(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
                / temperature
            )
            expected = torch.distributions.Categorical(logits=logits)
            length = len(completion)
            assert torch.allclose(
                together[row, :length], expected.log_prob(torch.tensor(completion)), atol=1e-5
            )
            assert torch.allclose(entropy[row, :length], expected.entropy(), atol=1e-5)


def test_the_adapters_reference_is_the_base(base: Qwen2ForCausalLM, batch: Batch) -> None:
    with torch.no_grad():
        expected = token_logprobs(base, batch, 1.0)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"), "member0"
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(token_logprobs(model, batch, 1.0), expected, atol=1e-3)
    assert torch.equal(AdapterOff(model).logprobs(batch, 1.0), expected)


def test_effective_rank_counts_equal_directions(adapted: PeftModel) -> None:
    # BA with three equal singular values has effective rank three.
    for layer in adapted.modules():
        if hasattr(layer, "lora_A") and "member0" in getattr(layer, "lora_A", {}):
            a, b = layer.lora_A["member0"].weight, layer.lora_B["member0"].weight
            with torch.no_grad():
                a.zero_()
                b.zero_()
                for i in range(3):
                    a[i, i] = 2.0
                    b[i, i] = 5.0
    statistics = adapter_statistics(adapted, "member0")
    assert statistics["lora/effective_rank"] == pytest.approx(3.0, rel=1e-4)
    modules = 7 * 2
    assert statistics["lora/norm_A"] == pytest.approx((modules * 3 * 4.0) ** 0.5, rel=1e-5)
    assert statistics["lora/norm_B"] == pytest.approx((modules * 3 * 25.0) ** 0.5, rel=1e-5)


def test_a_fresh_adapter_has_no_effective_rank(base: Qwen2ForCausalLM) -> None:
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]), "member0"
    )
    assert adapter_statistics(model, "member0")["lora/effective_rank"] == 0


def test_an_adapters_first_numbers_follow_the_runs_seed(base: Qwen2ForCausalLM) -> None:
    model: Qwen2ForCausalLM | PeftModel = base
    # A member's name has no part in it, and neither have the process's own random numbers.
    members = {"member0": 0, "member1": 0, "member2": 1}
    for place, (name, seed) in enumerate(members.items()):
        torch.manual_seed(place)
        recipe = quickstart([f"seed={seed}"])
        config = lora_config(recipe, recipe.trainer.policy.model.lora)
        model = add_adapter(model, name, config, _adapter_seed(recipe, name))
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    first, same, other = (layer.lora_A[name].weight for name in members)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("targets", "modules"),
    [("attention", "q_proj k_proj v_proj o_proj"), ("mlp", "gate_proj up_proj down_proj")],
)
def test_an_adapter_is_as_the_recipe_says(base: Any, targets: str, modules: str) -> None:
    keys = ["trainer.policy.model.lora.rank=4", "trainer.policy.model.lora.alpha=8"]
    recipe = quickstart([*keys, f"trainer.target_modules={targets}"])
    config = lora_config(recipe, recipe.trainer.policy.model.lora)
    model = add_adapter(base, "member0", config, seed=0)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
    assert {name.rpartition(".")[2] for name in layers} == set(modules.split())
    assert {one.scaling["member0"] for one in layers.values()} == {2.0}
