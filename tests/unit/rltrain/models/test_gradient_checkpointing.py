"""Checkpointed layers give the same gradients, bit by bit, and keep a thirtieth of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners import lora
from transformers import Qwen2Config, Qwen2ForCausalLM

from harness.config.schema import Recipe
from rltrain.data.batch import Batch, collate
from rltrain.models import attention
from rltrain.models import loading as models
from rltrain.models.logprobs import token_logprobs
from rltrain.models.lora import LoRALinear
from tests.recipes import quickstart

# A layer of Qwen2.5-0.5B.
SHAPE: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
TOKENS = 64


def _recipe(checkpointing: str) -> Recipe:
    return quickstart(
        [
            f"trainer.gradient_checkpointing={checkpointing}",
            "trainer.policy.model.lora.rank=32",
            "trainer.policy.model.dtype=bfloat16",
        ]
    )


def _model(layers: int, recipe: Recipe, folder: Any) -> Any:
    """A random model of bfloat16 with a float32 adapter, loaded as the trainer loads it; B not
    zero.
    """
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPE, num_hidden_layers=layers)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    base = models.load_model(str(folder), recipe, key="trainer.policy.model.path", full=False)
    assert base.config._attn_implementation == attention.NAME
    lora_config = models.lora_config(recipe, recipe.trainer.policy.model.lora)
    model = models.add_adapter(base, "own", lora_config, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    prompts, completions = (
        torch.randint(0, 100, (4, TOKENS // 2), generator=generator).tolist() for _ in range(2)
    )
    return collate(prompts, completions, [[0.0] * len(one) for one in completions], pad_id=0)


def _kept(model: Any) -> int:
    """Bytes that a forward pass keeps for the backward one, parameters aside; the gradients are
    there then.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = token_logprobs(model, _batch(), 1.0)
    logprobs.sum().backward()
    return sum(sizes.values())


def test_gradients_are_equal_to_the_bit_and_little_is_kept(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, gradients = {}, {}
    for name, checkpointing, forward in (
        ("peft", "false", lora.Linear.forward),
        ("plain", "auto", LoRALinear.forward),
        ("checkpointed", "true", LoRALinear.forward),
    ):
        monkeypatch.setattr(LoRALinear, "forward", forward)
        recipe = _recipe(checkpointing)
        one, two = (_model(layers, recipe, tmp_path / f"{name}{layers}") for layers in (1, 2))
        # What the second layer adds; 4 sequences, of which each computes all tokens but the last.
        kept[name] = (_kept(two) - _kept(one)) / (4 * (TOKENS - 1))
        gradients[name] = {key: p.grad for key, p in two.named_parameters() if p.grad is not None}
    assert kept["checkpointed"] == 2 * SHAPE["hidden_size"]
    # Of what PEFT's layers keep; ours keep a third less.
    assert kept["checkpointed"] < 0.031 * kept["plain"]
    assert kept["checkpointed"] <= 0.03 * kept["peft"]
    assert len(gradients["plain"]) == 2 * 2 * 7
    for key, gradient in gradients["plain"].items():
        assert gradient.any(), key
        assert torch.equal(gradient, gradients["checkpointed"][key]), key
