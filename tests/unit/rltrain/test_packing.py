"""A packed row with shared prompts gives what each sequence alone does, gradients included; so does a LoRA layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rltrain import attention
from rltrain.batch import Batch, collate
from rltrain.logprobs import token_logprobs, token_logprobs_and_entropy
from rltrain.lora import LoRALinear

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config), "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
}  # fmt: skip
# Three samples of a prompt, one of them empty and one a single token; a prompt that has one sample; two that have two.
PROMPTS = [[5, 6, 7], [5, 6, 7], [5, 6, 7], [8], [9, 10], [9, 10], [6, 5, 7, 3, 2], [6, 5, 7, 3, 2]]
COMPLETIONS = [[1, 2], [], [4], [3, 4, 9, 11], [12], [1, 1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9], [9]]
TEMPERATURE = 0.7


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PeftModel:
    """A random model of packed attention with an adapter, B not zero."""
    return _model(request.param)


def _model(architecture: str, implementation: str = attention.NAME, **settings: Any) -> PeftModel:
    kind, config = MODELS[architecture]
    torch.manual_seed(0)
    base = kind(config(**SHAPE, **settings, attn_implementation=implementation)).requires_grad_(False).eval()
    chosen = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    chosen._register_custom_module({torch.nn.Linear: LoRALinear})
    adapted = get_peft_model(base, chosen, "member0")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert isinstance(adapted, PeftModel)
    return adapted


def _batch() -> Batch:
    zeros = [[0.0] * len(completion) for completion in COMPLETIONS]
    return collate(PROMPTS, COMPLETIONS, zeros, pad_id=0)


def _gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _weights(batch: Batch) -> torch.Tensor:
    return torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1)) * batch.mask


def test_logprobs_and_gradients_are_those_of_each_sequence_alone(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, seen = _batch(), []
    model.get_base_model().register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    weights = _weights(batch)
    found, entropy = token_logprobs_and_entropy(model, batch, TEMPERATURE)
    (found * weights).sum().backward()
    gradients = _gradients(model)
    # Each prompt once, no padding, and no completion's last token.
    assert seen == [(1, 3 + 1 + 2 + 5 + sum(max(0, len(completion) - 1) for completion in COMPLETIONS))]
    # Apart, PEFT's own layers compute, transformers' own attention, and torch's own softmax.
    monkeypatch.setattr(LoRALinear, "forward", lora.Linear.forward)
    model.config._attn_implementation = "sdpa"
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        expected, length = torch.log_softmax(logits, dim=-1), len(completion)
        logprobs = expected[range(length), completion]
        torch.testing.assert_close(found[row, :length], logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[row, :length], -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=0)
        assert found[row, length:].eq(0).all()
        (logprobs * weights[row, :length]).sum().backward()
    alone = _gradients(model)
    assert gradients.keys() == alone.keys()
    assert len(alone) == 2 * 2 * 7
    for name, gradient in alone.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        assert gradient.norm() > 0.1, name


def test_a_model_whose_layers_look_back_only_so_far_is_padded() -> None:
    windows: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    packed, plain = _model("qwen2", **windows), _model("qwen2", "sdpa", **windows)
    found, expected = token_logprobs(packed, _batch(), 1.0), token_logprobs(plain, _batch(), 1.0)
    torch.testing.assert_close(found, expected)
    whole = token_logprobs(_model("qwen2"), _batch(), 1.0)
    assert (whole - expected).abs().max() > 0.1


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_under_dropout_each_sequence_has_a_prompt_of_its_own(rate: float) -> None:
    model, seen = _model("qwen2"), []
    model.peft_config["member0"].lora_dropout = rate
    model.get_base_model().register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    for mode in (True, False):
        token_logprobs(model.train(mode), _batch(), 1.0)
    once, each = sum(map(len, [[5, 6, 7], [8], [9, 10], [6, 5, 7, 3, 2]])), sum(map(len, PROMPTS))
    assert seen[0] - seen[1] == (each - once if rate else 0)


@pytest.mark.parametrize("tokens", [2, 200])
def test_the_lora_layer_computes_what_pefts_does(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _model("qwen2").get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert isinstance(layer, LoRALinear)
    results = []
    for forward in (LoRALinear.forward, lora.Linear.forward):
        monkeypatch.setattr(LoRALinear, "forward", forward)
        torch.manual_seed(2)
        x = torch.randn(3, tokens, 32, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        own = [layer.lora_A["member0"].weight, layer.lora_B["member0"].weight]
        results.append((y.grad_fn.name(), [y, x.grad, *(p.grad for p in own)]))
        layer.zero_grad(set_to_none=True)
    (kind, ours), (other, theirs) = results
    assert (kind == "_MergedBackward") == (tokens == 200)
    assert other not in ("_MergedBackward", "_LowRankBackward")
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-5)
