"""Adapters on the experts of a mixture: their ranks, scale and statistics, and what is active."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rltrain.models.loading import (
    active_parameters,
    adapter_layers,
    adapter_statistics,
    add_adapter,
    lora_config,
)
from tests.recipes import quickstart

EXPERTS, ACTIVE, HIDDEN, INNER = 4, 2, 16, 8


def mixture() -> Qwen3MoeForCausalLM:
    """Return a tiny random mixture of experts."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=40,
            hidden_size=HIDDEN,
            moe_intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=EXPERTS,
            num_experts_per_tok=ACTIVE,
        )
    )


def adapted(role: str, *overrides: str) -> PeftModel:
    """Return a mixture with an adapter of a role's recipe."""
    keys = [f"trainer.{role}.model.lora.{override}" for override in overrides]
    lora = getattr(quickstart(keys).trainer, role).model.lora
    return add_adapter(mixture(), "member0", lora_config(quickstart(keys), lora), seed=0)


def ranks(model: PeftModel) -> tuple[set[int], set[int]]:
    """Return the adapter's ranks on modules and on experts."""
    layers = adapter_layers(model, "member0").values()
    found: tuple[set[int], set[int]] = (set(), set())
    for layer in layers:
        found[isinstance(layer, ParamWrapper)].add(layer.r["member0"])
    return found


@pytest.mark.parametrize("role", ["policy", "critic"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rank=8"], ({8}, {8 // ACTIVE})),
        (["rank=1"], ({1}, {1})),
        (["rank=8", "expert_rank=3"], ({8}, {3})),
        (["rank=8", "target_modules=experts"], (set(), {4})),
        (["rank=8", "target_modules=mlp"], (set(), {4})),
        (["rank=8", "exclude_modules=experts"], ({8}, set())),
        (["rank=8", "expert_rank=3", "target_modules=attention"], ({8}, set())),
    ],
)
def test_the_rank_on_experts(
    role: str, overrides: list[str], expected: tuple[set[int], set[int]]
) -> None:
    assert ranks(adapted(role, *overrides)) == expected


def test_the_policys_rank_on_experts_is_not_the_critics() -> None:
    recipe = quickstart(
        ["trainer.policy.model.lora.expert_rank=3", "trainer.critic.model.lora.expert_rank=5"]
    )
    for role, rank in (("policy", 3), ("critic", 5)):
        config = lora_config(recipe, getattr(recipe.trainer, role).model.lora)
        assert ranks(add_adapter(mixture(), "member0", config, seed=0))[1] == {rank}


def test_alpha_is_the_same_on_experts_and_divided_by_their_rank() -> None:
    model = adapted("policy", "rank=8", "alpha=24")
    scales = {
        (isinstance(layer, ParamWrapper), layer.scaling["member0"])
        for layer in adapter_layers(model, "member0").values()
    }
    assert scales == {(False, 24 / 8), (True, 24 / 4)}


def test_the_router_gets_no_adapter() -> None:
    model = adapted("policy", "rank=8")
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    assert len(routers) == 2
    assert not any(isinstance(module, LoraLayer) for module in routers)


def test_the_effective_rank_is_a_mean_over_experts() -> None:
    model = adapted("policy", "rank=8", "expert_rank=3", "target_modules=experts")
    torch.manual_seed(1)
    expected: list[float] = []
    layers: dict[str, Any] = adapter_layers(model, "member0")
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["member0"].weight)
        for delta in layer.get_delta_weight("member0").detach():
            values = torch.linalg.svdvals(delta)
            share = values[:3] / values[:3].sum()
            assert values[3:].max() < 1e-4 * values[0]
            expected.append(float(torch.exp(-(share * share.log()).sum())))
    assert len(expected) == 2 * 2 * EXPERTS
    statistics = adapter_statistics(model, "member0")
    assert statistics["lora/effective_rank"] == pytest.approx(
        sum(expected) / len(expected), rel=1e-4
    )


def test_only_a_tokens_experts_are_active() -> None:
    model = mixture()
    idle = 2 * (EXPERTS - ACTIVE) * 3 * HIDDEN * INNER
    assert active_parameters(model) == model.num_parameters() - idle
