"""PPO's critic on a tiny random model: what its values are, what its loss is, what it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Qwen2Config, Qwen2ForCausalLM

from harness.config.schema import Recipe
from rltrain.algorithms.critic import Critic, ValueHead
from rltrain.data.batch import Batch, collate
from rltrain.distributed.process_group import Ranks
from rltrain.models.loading import adapter_parameters, add_adapter, lora_config
from rltrain.models.logprobs import token_logprobs
from tests.recipes import quickstart

HIDDEN = 32
PROMPTS = [[5, 6, 7], [8], [9, 10]]
COMPLETIONS = [[1, 2], [3, 4, 9, 11], [12]]


@pytest.fixture
def base() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def batch() -> Batch:
    logprobs = [[-1.0] * len(completion) for completion in COMPLETIONS]
    return collate(PROMPTS, COMPLETIONS, logprobs, pad_id=0)


def _recipe(*overrides: str) -> Recipe:
    fast = ["trainer.critic.optimizer_config.lr=1e-2", "trainer.critic.model.lora.rank=4"]
    return quickstart(["trainer.algorithm.advantage_estimator=gae", *fast, *overrides])


def _critic(base: Any, *overrides: str) -> Critic:
    """A critic's adapter beside the policy's, on one base."""
    recipe = _recipe(*overrides)
    model = add_adapter(
        base, "member0", lora_config(recipe, recipe.trainer.policy.model.lora), seed=1
    )
    model = add_adapter(
        model, "member0_critic", lora_config(recipe, recipe.trainer.critic.model.lora), seed=2
    )
    return Critic("member0_critic", model, adapter_parameters(model, "member0_critic"), recipe, 100)


def _set_head(critic: Critic, seed: int = 3) -> None:
    """A head whose values are of order one."""
    with torch.no_grad():
        critic.head.weight.copy_(
            0.2 * torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed))
        )
        critic.head.bias.fill_(0.5)


def test_values_are_the_heads_on_the_states_that_tokens_were_drawn_from(
    base: Any, batch: Batch
) -> None:
    critic = _critic(base)
    _set_head(critic)
    critic.activate()
    with torch.no_grad():
        found = critic.values(batch)
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            states = base.model(torch.tensor([prompt + completion])).last_hidden_state[
                0, len(prompt) - 1 : -1
            ]
            expected = states @ critic.head.weight[0] + critic.head.bias
            assert torch.allclose(found[row, : len(completion)], expected, atol=1e-5)
    assert found.dtype == torch.float32
    assert found.shape == batch.mask.shape


def test_the_language_models_head_comes_back(base: Any, batch: Batch) -> None:
    with torch.no_grad():
        before = token_logprobs(base, batch, 1.0)
        head = base.get_output_embeddings()
        critic = _critic(base)
        critic.activate()
        critic.values(batch)
        assert base.get_output_embeddings() is head
        assert torch.equal(token_logprobs(base, batch, 1.0), before)


def test_a_fresh_head_says_little_and_follows_the_seed() -> None:
    weights = [ValueHead(1000, seed).weight for seed in (0, 0, 1)]
    assert weights[0].std().item() == pytest.approx(1 / 1001, rel=0.1)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("clip", "loss", "held"),
    # A value of 1 above the old one, its target another 1 above: as it is, or as far as it may
    # move.
    [(2.0, 0.5 * 1.0**2, 0.0), (0.2, 0.5 * 1.8**2, 1.0), (0.5, 0.5 * 1.5**2, 1.0)],
)
def test_value_clip_bounds_how_far_a_value_moves(
    base: Any, batch: Batch, clip: float, loss: float, held: float
) -> None:
    critic = _critic(base, f"trainer.algorithm.value_clip={clip}")
    _set_head(critic)
    critic.activate()
    with torch.no_grad():
        values = critic.values(batch)
    batch.values, batch.returns = values - 1, values + 1
    found, stats = critic.loss(batch, critic.totals(batch))
    assert found.item() == pytest.approx(loss, rel=1e-4)
    assert stats["vf_loss"] == pytest.approx(loss, rel=1e-4)
    assert stats["clip_ratio"] == pytest.approx(held)
    found.backward()
    assert critic.head.weight.grad is not None
    assert bool(critic.head.weight.grad.abs().max() > 1e-6) is (held == 0)


def test_the_loss_is_a_mean_over_the_mini_batchs_trained_tokens(base: Any, batch: Batch) -> None:
    critic = _critic(base, "trainer.algorithm.value_clip=1e9")
    critic.activate()
    with torch.no_grad():
        batch.values = critic.values(batch)
    batch.returns = batch.values + torch.tensor([[1.0], [2.0], [4.0]])
    batch.loss_mask[2] = 0
    totals = critic.totals(batch)
    parts = [critic.loss(batch.take([row]), totals)[0].item() for row in range(3)]
    assert sum(parts) == pytest.approx(0.5 * (2 * 1 + 4 * 4) / 6, rel=1e-4)
    assert critic.loss(batch, totals)[0].item() == pytest.approx(sum(parts), rel=1e-4)


def test_adapter_and_head_learn_and_nothing_else_moves(base: Any, batch: Batch) -> None:
    critic = _critic(base)
    model: PeftModel = critic.model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    head = [parameter.clone() for parameter in critic.head.parameters()]
    targets = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [-1.0, 0.0, 0.0, 0.0]])
    losses = []
    for _ in range(60):
        critic.activate()
        with torch.no_grad():
            batch.values = critic.values(batch)
        batch.returns = targets
        loss, _ = critic.loss(batch, critic.totals(batch))
        loss.backward()
        critic.optimize(Ranks())
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    assert all(
        not torch.equal(old, new) for old, new in zip(head, critic.head.parameters(), strict=True)
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (".member0_critic." not in name), name
