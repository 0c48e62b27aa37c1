"""A packed row gives what separate sequences give, gradients included; so do LoRA layers."""

from __future__ import annotations

import itertools
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

from rltrain.data.batch import Batch, collate
from rltrain.models import attention
from rltrain.models.logprobs import token_logprobs, token_logprobs_and_entropy
from rltrain.models.lora import LoRALinear

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
}
# Three samples of a prompt, one of them empty and one a single token; a prompt that has one sample;
# two that have two.
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
    base = (
        kind(config(**SHAPE, **settings, attn_implementation=implementation))
        .requires_grad_(False)
        .eval()
    )
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


class FlashAttention:
    """`torch.nn.attention.varlen.varlen_attn` computed by segment on a CPU; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        longest_query: int,
        longest_key: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool = True,
    ) -> torch.Tensor:
        self.calls += 1
        assert (query_starts.dtype, window_size, enable_gqa) == (torch.int32, (-1, 0), True)
        spans = [list(itertools.pairwise(starts.tolist())) for starts in (query_starts, key_starts)]
        assert [max(end - start for start, end in one) for one in spans] == [
            longest_query,
            longest_key,
        ]
        assert [one[-1][1] for one in spans] == [len(query), len(key)]
        outputs = []
        for (first, last), (begin, end) in zip(*spans, strict=True):
            q, k, v = query[first:last], key[begin:end], value[begin:end]
            k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], dim=1) for one in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            # Both ends are aligned: the last query sees all keys.
            reach = torch.arange(len(q))[:, None] + len(k) - len(q)
            scores = scores.masked_fill(torch.arange(len(k)) > reach, -torch.inf)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v))
        return torch.cat(outputs)


@pytest.mark.parametrize("varlen", [False, True])
def test_logprobs_and_gradients_are_those_of_each_sequence_alone(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch, varlen: bool
) -> None:
    batch, seen, flash = _batch(), [], FlashAttention()
    monkeypatch.setattr("rltrain.models.logprobs.has_varlen", lambda device, dtype: varlen)
    monkeypatch.setattr(attention, "varlen_attn", flash)
    model.get_base_model().register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    weights = _weights(batch)
    found, entropy = token_logprobs_and_entropy(model, batch, TEMPERATURE)
    (found * weights).sum().backward()
    gradients = _gradients(model)
    assert flash.calls == (SHAPE["num_hidden_layers"] if varlen else 0)
    # Each prompt once, no padding, and no completion's last token.
    assert seen == [
        (1, 3 + 1 + 2 + 5 + sum(max(0, len(completion) - 1) for completion in COMPLETIONS))
    ]
    # Apart, PEFT's own layers compute, transformers' own attention, and torch's own softmax.
    monkeypatch.setattr(LoRALinear, "forward", lora.Linear.forward)
    model.config._attn_implementation = "sdpa"
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        logits = (
            model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            / TEMPERATURE
        )
        expected, length = torch.log_softmax(logits, dim=-1), len(completion)
        logprobs = expected[range(length), completion]
        torch.testing.assert_close(found[row, :length], logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            entropy[row, :length], -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=0
        )
        assert found[row, length:].eq(0).all()
        (logprobs * weights[row, :length]).sum().backward()
    alone = _gradients(model)
    assert gradients.keys() == alone.keys()
    assert len(alone) == 2 * 2 * 7
    for name, gradient in alone.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        assert gradient.norm() > 0.1, name


def test_layers_that_look_back_only_so_far_are_packed() -> None:
    windows: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 0,
    }
    packed, plain = _model("qwen2", **windows), _model("qwen2", "sdpa", **windows)
    assert attention.can_pack(packed.config)
    assert not attention.can_pack(plain.config)
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
def test_the_lora_layer_computes_what_pefts_does(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lora_layer_is_about_as_near_as_pefts_to_exact_numbers(dtype: torch.dtype) -> None:
    exact = _model("qwen2").double()
    names = ("base_model.model.model.layers.0.self_attn.q_proj", "member0")
    torch.manual_seed(3)
    x, dy = torch.randn(2, 5, 32).to(dtype), torch.randn(2, 5, 32).to(dtype)

    def results(layer: Any, forward: Any, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        y = forward(layer, x)
        own = [layer.lora_A[names[1]].weight, layer.lora_B[names[1]].weight]
        return [y, *torch.autograd.grad(y, [x, *own], dy.to(y.dtype))]

    layer = exact.get_submodule(names[0])
    assert isinstance(layer, LoRALinear)
    expected = results(layer, lora.Linear.forward, x.double())
    layer = layer.to(dtype)
    for adapter in (layer.lora_A, layer.lora_B):
        adapter.float()
    ours, theirs = (
        results(layer, forward, x) for forward in (LoRALinear.forward, lora.Linear.forward)
    )
    for one, other, right in zip(ours, theirs, expected, strict=True):
        assert one.dtype == other.dtype
        error, of_peft = ((found.double() - right).norm() / right.norm() for found in (one, other))
        assert error <= max(3 * of_peft, 1e-6), (float(error), float(of_peft))


def test_layers_that_share_an_input_keep_it_once_and_no_copy_of_it() -> None:
    model = _model("qwen2").to(torch.bfloat16)
    layers = [
        model.get_submodule(f"base_model.model.model.layers.0.self_attn.{name}_proj")
        for name in "qkv"
    ]
    for layer in layers:
        layer.lora_A.float()
        layer.lora_B.float()
    x = torch.randn(4, 7, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        [layer(x) for layer in layers]
    own = {
        tensor.data_ptr()
        for tensor in kept
        if tensor.numel() >= x.numel() and tensor.shape[0] != 32
    }
    assert own == {x.data_ptr()}
