"""Memory estimates against arithmetic by hand and against what autograd keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.config.shapes import ModelShape, shape_of
from rltrain.models import memory
from rltrain.models.memory import GIB, members_that_fit, pass_bytes, tokens_that_fit, usage

LORA = "trainer.policy.model.lora"
SMALL = ModelShape(
    hidden=256, layers=3, heads=4, kv_heads=2, head_dim=64, intermediate=1024, vocab=300, tied=True
)
# 300 x 256 embeddings; a layer's attention 2 x 256 x 256 + 2 x 256 x 128, its MLP 3 x 256 x 1024.
SMALL_PARAMETERS = 76_800 + 3 * (196_608 + 786_432)
# Rank 1 on every projection of a layer: 512 + 384 + 384 + 512, and 3 x 1280; times 3 layers.
SMALL_ADAPTER = 3 * 5632


def recipe_of(**values: Any) -> Recipe:
    path = {
        "trainer.policy.model.path": "Qwen/Qwen2.5-0.5B-Instruct",
        "trainer.placement.device": "cuda",
    }
    return recipes.from_dict(_nested(path | values))


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *groups, leaf = key.split(".")
        group = nested
        for name in groups:
            group = group.setdefault(name, {})
        group[leaf] = value
    return nested


def qwen(size: str = "0.5B") -> ModelShape:
    shape = shape_of(f"Qwen/Qwen2.5-{size}")
    assert shape is not None
    return shape


def test_lora_run_by_hand() -> None:
    recipe = recipe_of(
        **{
            f"{LORA}.rank": 8,
            "generator.max_num_seqs": 4,
            "generator.max_input_length": 100,
            "generator.sampling_params.max_generate_length": 28,
            "generator.eval_sampling_params.max_generate_length": 156,
            "trainer.max_tokens_per_microbatch": 1000,
        }
    )
    held = usage(recipe, SMALL, 80 * GIB, members=3)
    assert held.sampling == {
        "CUDA and its allocator": 1.5 * GIB,
        "base": 2 * SMALL_PARAMETERS,
        "adapters and their optimizers": 3 * 12 * 8 * SMALL_ADAPTER,
        "engine: weights": 2 * SMALL_PARAMETERS,
        "engine: activations, graphs": 1.5 * GIB + 2 * 4 * 4 * 300,
        "engine: room for adapters": 3 * 2 * 8 * SMALL_ADAPTER,
        # Keys and values of 4 sequences of 256 tokens: 2 x 3 layers x 2 heads x 64 x 2 bytes a
        # token.
        "engine: keys and values": 4 * 256 * 1536,
    }
    assert held.training == {
        "CUDA and its allocator": 1.5 * GIB,
        "base": 2 * SMALL_PARAMETERS,
        "engine asleep": GIB,
        "adapters and their optimizers": 3 * 12 * 8 * SMALL_ADAPTER,
        "gradients": 3 * 4 * 8 * SMALL_ADAPTER,
        "activations of 1,000 tokens": 1000 * 3 * 256 * 2,
        # 13,424 bytes a token by the test below, 7% more to round up, and twice a gradient of 1024
        # in 2 bytes.
        "the layer that is computed": pytest.approx(1000 * (13_424 * 1.07 + 4 * 1024), abs=1),
        "logits of a chunk": 3 * 4 * 1000 * 300 + 1000 * 256 * 2,
    }
    assert held.apart == {}


def test_a_token_of_qwen_takes_little_with_checkpointing_and_much_without() -> None:
    plain = recipe_of(**{"trainer.gradient_checkpointing": False})
    kept = pass_bytes(plain, qwen(), 20_000, on_gpu=True) - pass_bytes(
        plain, qwen(), 10_000, on_gpu=True
    )
    head, moving = 896 * 2, 4 * 4864
    assert kept / 10_000 - head - moving == pytest.approx(1.44e6, rel=0.01)
    (activations,) = (
        size
        for name, size in usage(recipe_of(), qwen(), 80 * GIB).training.items()
        if "tokens" in name
    )
    assert activations / 65_536 == pytest.approx(0.043e6, rel=0.01)


@pytest.mark.parametrize("rank", [8, 0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_keeps_no_more_than_is_reckoned_with(rank: int, dtype: str) -> None:
    values = {
        f"{LORA}.rank": rank,
        "trainer.policy.model.dtype": dtype,
        "trainer.gradient_checkpointing": False,
    }
    recipe = recipe_of(**values)
    tokens = 256
    reckoned = memory._layer_bytes(recipe, SMALL, on_gpu=True) * tokens
    real = _kept(3, rank, getattr(torch, dtype), tokens) - _kept(
        2, rank, getattr(torch, dtype), tokens
    )
    assert 0.75 * reckoned < real < reckoned


def _kept(layers: int, rank: int, dtype: torch.dtype, tokens: int) -> int:
    """Bytes that autograd keeps of a model's forward pass, its parameters aside."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rltrain.models.loading import add_adapter, lora_config

    shape = dataclasses.replace(SMALL, layers=layers)
    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=True,
    )
    model: Any = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").to(dtype)
    if rank:
        recipe = recipe_of(**{f"{LORA}.rank": rank})
        model.requires_grad_(False)
        model = add_adapter(model, "own", lora_config(recipe, recipe.trainer.policy.model.lora), 0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.arange(tokens)[None] % shape.vocab, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_full_fine_tuning_by_hand() -> None:
    recipe = recipe_of(**{f"{LORA}.rank": 0, "trainer.algorithm.use_kl_loss": True})
    held = usage(recipe, SMALL, 80 * GIB)
    assert held.training["weights in float32"] == 4 * SMALL_PARAMETERS
    assert held.training["weights as autocast copies them"] == 2 * SMALL_PARAMETERS
    assert held.training["reference model"] == 2 * SMALL_PARAMETERS
    assert (held.training["optimizer"], held.training["gradients"]) == (
        8 * SMALL_PARAMETERS,
        4 * SMALL_PARAMETERS,
    )
    assert "engine: room for adapters" not in held.sampling


def test_ranks_share_the_base_and_gather_two_layers_of_it() -> None:
    four = {"trainer.placement.policy_num_gpus_per_node": 4, "generator.num_inference_engines": 4}
    alone, sharded = (usage(recipe_of(**values), qwen("7B"), 80 * GIB) for values in ({}, four))
    assert sharded.training["base"] == alone.training["base"] // 4
    assert sharded.training["gradients"] == alone.training["gradients"]
    gathered = 2 * (qwen("7B").embedding_parameters + 2 * qwen("7B").layer_parameters)
    assert (
        sharded.training["the layer that is computed"]
        == alone.training["the layer that is computed"] + gathered
    )


def test_a_critic_has_an_adapter_on_the_policys_base_or_a_base_of_its_own() -> None:
    ppo = {"trainer.algorithm.advantage_estimator": "gae", "trainer.critic.model.lora.rank": 32}
    shared = usage(recipe_of(**ppo), qwen(), 80 * GIB, members=2)
    assert shared.training["gradients"] == 2 * 2 * 4 * qwen().adapter_parameters(32)
    assert "the critic's own base" not in shared.training
    other = recipe_of(**ppo, **{"trainer.critic.model.path": "Qwen/Qwen2.5-1.5B"})
    own = usage(other, qwen(), 80 * GIB, members=2)
    assert own.training["the critic's own base"] == 2 * 2 * qwen("1.5B").parameters


def test_an_engine_apart_has_its_gpus_and_its_share_of_them() -> None:
    apart = {
        "trainer.placement.colocate_all": False,
        "generator.inference_engine_tensor_parallel_size": 2,
    }
    held = usage(recipe_of(**apart), qwen("7B"), 80 * GIB)
    assert set(held.phases()) == {"sampling", "training", "engine"}
    assert not any("engine" in name for name in (*held.sampling, *held.training))
    assert held.apart["engine: weights"] == qwen("7B").parameters
    # 256 sequences of 1536 tokens, 28 layers, two of the four heads.
    assert held.apart["engine: keys and values"] == 256 * 1536 * 2 * 2 * 28 * 2 * 128


def test_the_cache_takes_what_the_utilization_leaves_and_one_sequence_at_least() -> None:
    wide = recipe_of(**{"generator.max_num_seqs": 4096})
    held = usage(wide, qwen(), 24 * GIB)
    assert held.engine == pytest.approx(0.8 * 24 * GIB, rel=1e-6)
    little = usage(recipe_of(**{"generator.gpu_memory_utilization": 0.01}), qwen(), 24 * GIB)
    assert little.sampling["engine: keys and values"] == 1536 * 2 * 2 * 24 * 2 * 64


def test_transformers_samples_from_the_trainers_weights() -> None:
    held = usage(recipe_of(**{"generator.backend": "transformers"}), qwen(), 80 * GIB)
    assert held.engine == 0
    assert "engine: weights" not in held.sampling
    assert not any("engine" in name for name in held.training)


def test_tokens_are_powers_of_two_that_grow_with_the_memory() -> None:
    recipe = recipe_of()
    found = [
        tokens_that_fit(recipe, qwen(), gib * GIB, on_gpu=True, members=1)
        for gib in (0, 1, 2, 4, 8, 16, 64)
    ]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (256, 65_536)
    assert all(tokens & (tokens - 1) == 0 for tokens in found)
    for gib, tokens in zip((4, 8), found[3:5], strict=True):
        left = 0.85 * gib * GIB - 16 * qwen().adapter_parameters(32)
        assert pass_bytes(recipe, qwen(), tokens, on_gpu=True) <= left
        assert pass_bytes(recipe, qwen(), 2 * tokens, on_gpu=True) > left


def test_members_and_a_larger_model_leave_fewer_tokens_and_checkpoints_more() -> None:
    def tokens(gib: float, members: int = 1, size: str = "0.5B", checkpoints: bool = True) -> int:
        recipe = recipe_of(**{"trainer.gradient_checkpointing": checkpoints})
        return tokens_that_fit(recipe, qwen(size), gib * GIB, on_gpu=True, members=members)

    assert tokens(6, members=16) < tokens(6)
    assert tokens(8, size="7B") < tokens(8)
    assert tokens(8, checkpoints=False) < tokens(8)


def test_trials_of_a_sweep_get_the_same_number() -> None:
    """Rank, targets, rates and lengths differ among them; the rank that the engine has room for
    does not.
    """
    room = {"generator.max_lora_rank": 128}
    trials: list[dict[str, Any]] = [
        {f"{LORA}.rank": 1},
        {f"{LORA}.rank": 128},
        {"trainer.target_modules": "attention"},
        {"generator.sampling_params.max_generate_length": 64},
    ]
    found = {
        tokens_that_fit(recipe_of(**room, **one), qwen(), 7 * GIB, on_gpu=True, members=8)
        for one in trials
    }
    assert len(found) == 1


def test_on_a_cpu_passes_are_small_in_float32_and_keep_everything() -> None:
    recipe = recipe_of(**{"trainer.placement.device": "cpu"})
    assert tokens_that_fit(recipe, SMALL, 64 * GIB, on_gpu=False, members=1) == 2048
    assert pass_bytes(recipe, SMALL, 512, on_gpu=False) > 2 * pass_bytes(
        recipe_of(**{"trainer.gradient_checkpointing": True}), SMALL, 512, on_gpu=True
    )
    held = usage(recipe, SMALL, 16 * GIB, on_gpu=False)
    assert held.training["base"] == 4 * SMALL_PARAMETERS
    assert held.training["engine: keys and values"] == GIB  # generator.cpu_kv_cache_gb
    assert members_that_fit(recipe, SMALL, 16 * GIB, on_gpu=False) == 16


def test_members_grow_with_the_card_and_leave_room_for_a_pass() -> None:
    recipe = recipe_of(**{f"{LORA}.rank": 128})
    found = [members_that_fit(recipe, qwen("1.5B"), gib * GIB) for gib in (24, 32, 40, 48, 80)]
    assert found == sorted(found)
    assert found[-1] == 16 > found[2] > 1
    assert members_that_fit(recipe, qwen("14B"), 24 * GIB) == 1  # none fits: one is tried
    full = recipe_of(**{f"{LORA}.rank": 0})
    assert members_that_fit(full, qwen("7B"), 80 * GIB) == 1
    held = usage(recipe, qwen("1.5B"), 40 * GIB, members=found[2])
    assert held.tokens >= 16_384
    assert max(sum(parts.values()) for parts in held.phases().values()) <= 40 * GIB


def test_a_pass_is_no_larger_than_its_mini_batch_and_no_smaller_than_a_sequence() -> None:
    few = recipe_of(**{"trainer.policy_mini_batch_size": 2, "trainer.train_batch_size": 2})
    assert usage(few, SMALL, 80 * GIB).tokens == 2 * 4 * 1536
    bounded = recipe_of(**{"trainer.micro_train_batch_size_per_gpu": 3})
    assert usage(bounded, SMALL, 80 * GIB).tokens == 3 * 1536
    assert (
        usage(recipe_of(**{"trainer.max_tokens_per_microbatch": 100}), SMALL, 80 * GIB).tokens
        == 1536
    )
    assert (
        usage(recipe_of(**{"trainer.max_tokens_per_microbatch": None}), SMALL, GIB).tokens
        == 128 * 4 * 1536
    )
