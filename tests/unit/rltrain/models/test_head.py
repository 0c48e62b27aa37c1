"""Log-probabilities computed in chunks equal those from all logits, and need less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rltrain.data.batch import Batch, collate
from rltrain.models import attention, logprobs
from rltrain.models.logprobs import chosen_logprobs, token_logprobs, token_logprobs_and_entropy
from rltrain.models.lora import LoRALinear

ROWS, WIDTH, VOCABULARY = 40, 24, 500
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that is made inside."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return made


@pytest.fixture(autouse=True)
def _seven_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 7 * 4 * VOCABULARY)


def _head(*, bias: bool, trained: bool) -> torch.nn.Linear:
    torch.manual_seed(3)
    return torch.nn.Linear(WIDTH, VOCABULARY, bias=bias).requires_grad_(trained)


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    weights = torch.linspace(-1, 2, ROWS)
    return torch.randn(ROWS, WIDTH), torch.randint(0, VOCABULARY, (ROWS,)), weights


def _whole(
    hidden: torch.Tensor,
    head: Any,
    tokens: torch.Tensor,
    temperature: float,
    softcap: float | None,
) -> torch.Tensor:
    """The same from all logits at once."""
    logits = head(hidden)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return torch.stack([distribution.log_prob(tokens), distribution.entropy()], dim=1)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_values_and_gradients_are_those_of_all_logits(
    softcap: float | None, temperature: float, bias: bool, trained: bool
) -> None:
    results = []
    for compute in (chosen_logprobs, _whole):
        head = _head(bias=bias, trained=trained)
        hidden, tokens, weights = _inputs()
        hidden.requires_grad_()
        both = compute(hidden, head, tokens, temperature, softcap)
        (both[:, 0] * weights).sum().backward()
        gradients = [p.grad for p in (hidden, *head.parameters()) if p.grad is not None]
        assert len(gradients) == (1 + trained * (1 + bias))
        results.append([both.detach(), *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.5])
def test_no_tensor_of_all_rows_by_the_vocabulary_is_made(
    softcap: float | None, trained: bool
) -> None:
    head, (hidden, tokens, _) = _head(bias=False, trained=trained), _inputs()
    with Largest() as largest:
        both = chosen_logprobs(hidden.requires_grad_(), head, tokens, 1.0, softcap)
        both[:, 0].sum().backward()
    assert largest.numel == max(7, WIDTH) * VOCABULARY < ROWS * VOCABULARY


def test_a_frozen_head_is_gone_through_once_for_values_and_gradient() -> None:
    head, (hidden, tokens, _) = _head(bias=False, trained=False), _inputs()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = chosen_logprobs(hidden.requires_grad_(), head, tokens, 1.0)
    assert [tensor.shape for tensor in kept] == [(ROWS, WIDTH)]
    with Largest() as largest:
        found[:, 0].sum().backward()
    assert largest.numel == ROWS * WIDTH


def test_entropy_has_no_gradient_and_nothing_at_all_is_no_error() -> None:
    head, (hidden, tokens, _) = _head(bias=False, trained=False), _inputs()
    chosen_logprobs(hidden.requires_grad_(), head, tokens, 1.0)[:, 1].sum().backward()
    assert not hidden.grad.any()  # type: ignore[union-attr]
    assert chosen_logprobs(hidden[:0], head, tokens[:0], 1.0).shape == (0, 2)


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    lengths = [(5, 9), (5, 4), (3, 12)]
    draw = [
        [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in pair]
        for pair in lengths
    ]
    draw[1][0] = draw[0][0]
    return collate(
        [p for p, _ in draw], [c for _, c in draw], [[0.0] * len(c) for _, c in draw], pad_id=0
    )


def _reference(model: Any, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies from the model's own logits, sequence by sequence."""
    found, entropies = torch.zeros_like(batch.mask), torch.zeros_like(batch.mask)
    for row in range(len(batch)):
        one = batch.take([row])
        ids = torch.cat([one.prompt_ids, one.completion_ids], dim=1)
        logits = (
            model(input_ids=ids, use_cache=False).logits[:, one.prompt_ids.shape[1] - 1 : -1]
            / temperature
        )
        distribution = torch.distributions.Categorical(logits=logits)
        found[row, : one.completion_ids.shape[1]] = distribution.log_prob(one.completion_ids)[0]
        entropies[row, : one.completion_ids.shape[1]] = distribution.entropy()[0]
    return found, entropies


def _models() -> dict[str, Any]:
    torch.manual_seed(6)
    packed = {"attn_implementation": attention.NAME}
    tied = Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, **packed, tie_word_embeddings=True)
    ).requires_grad_(False)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    config._register_custom_module({torch.nn.Linear: LoRALinear})
    untied = Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, **packed, tie_word_embeddings=False)
    ).requires_grad_(False)
    # Its logits are capped after the head, and its layers do not all attend to everything.
    gemma = Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, **packed, sliding_window=4, final_logit_softcapping=3.0)
    )
    whole = Qwen2ForCausalLM(Qwen2Config(**SHAPE, **packed, tie_word_embeddings=True))
    adapted: Any = get_peft_model(untied, config)
    return {
        "tied": tied,
        "lora_on_head": adapted,
        "changed_logits": gemma,
        "all_trained_tied": whole,
    }


@pytest.mark.parametrize("name", ["tied", "lora_on_head", "changed_logits", "all_trained_tied"])
def test_every_kind_of_head_gives_the_models_own_log_probabilities(name: str) -> None:
    model, batch = _models()[name].eval(), _batch()
    expected, entropies = _reference(model, batch, 0.8)
    found, entropy = token_logprobs_and_entropy(model, batch, 0.8)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, entropies, atol=2e-5, rtol=1e-5)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if trained:
        ours = torch.autograd.grad(found.sum(), list(trained.values()))
        theirs = torch.autograd.grad(expected.sum(), list(trained.values()))
        for key, one, other in zip(trained, ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3, msg=key)


def test_the_models_head_is_back_in_its_place_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = _models()["tied"], _batch()
    head = model.get_output_embeddings()
    monkeypatch.setattr(logprobs, "chosen_logprobs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_logprobs(model, batch, 1.0)
    assert model.get_output_embeddings() is head
