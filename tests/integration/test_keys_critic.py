"""Test runs with a critic, by LoRA and by full fine-tuning.

Head and adapter train, and checkpoints restore them to the bit.
"""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.records.run_dir import RunDir, Status
from rltrain.algorithms.critic import Critic
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.step import train_step
from rltrain.trainer import Trainer
from tests.integration.training import MakeRecipe, MakeRun, rows, train, train_run

Tensors = dict[str, torch.Tensor]
PPO = "trainer.algorithm.advantage_estimator=gae"


def _run(recipe: Recipe, run: RunDir, stop_after: int | None = None) -> Tensors:
    """Train a run and return the critic's parameters at the end."""
    with Trainer(recipe) as trainer:
        list(islice(train(trainer, recipe, run), stop_after))
        critic = trainer.pack.members[0].critic
        assert critic is not None
        return {name: p.detach().clone() for name, p in critic.parameters.items()}


@pytest.fixture
def ppo(small_recipe: MakeRecipe) -> MakeRecipe:
    """Return a function that composes a small PPO recipe."""

    def make(*overrides: str) -> Recipe:
        return small_recipe(
            PPO, "trainer.eval_interval=0", "trainer.algorithm.lambd=0.9", *overrides
        )

    return make


def test_resumed_ppo_run_equals_uninterrupted_run(ppo: MakeRecipe, new_run: MakeRun) -> None:
    schedule = (
        "trainer.critic.optimizer_config.lr=1e-3",
        "trainer.critic.optimizer_config.scheduler=linear",
    )
    recipe = ppo(*schedule, "trainer.critic_mini_batch_size=1")
    uninterrupted, resumed = new_run(recipe, "uninterrupted"), new_run(recipe, "resumed")
    expected = _run(recipe, uninterrupted)
    _run(recipe, resumed, stop_after=4)  # one step past the checkpoint
    assert resumed.status is Status.RUNNING
    saved = load_file(resumed.checkpoints / "step_000002" / "critic.safetensors")
    assert {"value_head.weight", "value_head.bias"} < saved.keys()
    actual = _run(recipe, resumed)
    assert rows(uninterrupted) == rows(resumed)
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert not torch.equal(saved["value_head.weight"], expected["value_head.weight"])
    adapters = [
        load_file(run.adapter / "final" / "adapter_model.safetensors")
        for run in (uninterrupted, resumed)
    ]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    logged = rows(uninterrupted)[1:]
    assert [row["critic/learning_rate"] for row in logged] == pytest.approx(
        [1e-3 * f for f in (1, 0.75, 0.5, 0.25)]
    )
    assert all(
        {"critic/vf_loss", "critic/grad_norm", "critic/explained_variance"} <= row.keys()
        for row in logged
    )


def test_resumed_full_fine_tuning_of_both_equals_uninterrupted_run(
    ppo: MakeRecipe, new_run: MakeRun
) -> None:
    full = [f"trainer.{role}.model.lora.rank=0" for role in ("policy", "critic")]
    recipe = ppo(
        *full,
        "trainer.policy.model.lora.sync=merge",
        "trainer.policy.optimizer_config.lr=1e-4",
        "trainer.max_steps=2",
        "trainer.ckpt_interval=1",
        "trainer.eval_before_train=false",
    )
    uninterrupted, resumed = new_run(recipe, "uninterrupted"), new_run(recipe, "resumed")
    expected = _run(recipe, uninterrupted)
    _run(recipe, resumed, stop_after=1)
    assert resumed.status is Status.RUNNING
    actual = _run(recipe, resumed)
    assert rows(uninterrupted) == rows(resumed)
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    models = [
        load_file(run.adapter / "final" / "model.safetensors") for run in (uninterrupted, resumed)
    ]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_a_checkpoint_without_a_critic_is_refused(
    small_recipe: MakeRecipe, ppo: MakeRecipe, new_run: MakeRun
) -> None:
    first = new_run(small_recipe(), "grpo")
    recipe = small_recipe("trainer.max_steps=1", "trainer.eval_before_train=false")
    train_run(recipe, first)
    other = ppo(f"trainer.resume_mode={first.checkpoints}/step_000001")
    with pytest.raises(UserError, match="does not fit this recipe's critic"):
        _run(other, new_run(other, "ppo"))


def _stepped(
    recipe: Recipe, run: RunDir
) -> tuple[Pack, Member, Critic, dict[str, Tensors], dict[str, float]]:
    """Take one step of a pack's only member.

    Returns the pack, the metrics, and each trained model's parameters from before the step.
    """
    pack = Pack.open(recipe)
    member = pack.add(recipe, run)
    pack.publish_member(member)
    before = {
        one.name: {n: p.detach().clone() for n, p in one.parameters.items()}
        for one in member.trained_models
    }
    row = train_step(pack, pack.members)[member]
    assert member.critic is not None
    return pack, member, member.critic, before, row


def test_a_critic_of_rank_0_trains_a_separate_base(ppo: MakeRecipe, new_run: MakeRun) -> None:
    recipe = ppo("trainer.critic.model.lora.rank=0")
    pack, member, critic, before, row = _stepped(recipe, new_run(recipe, "run"))
    assert critic.model is not pack.model
    trained = {name.removeprefix("value_head.") for name in critic.parameters}
    assert {"model.norm.weight", "model.embed_tokens.weight", "weight", "bias"} <= trained
    assert all(not torch.equal(p, before["critic"][name]) for name, p in critic.parameters.items())
    base = {name: p for name, p in member.policy.model.named_parameters() if ".lora_" not in name}
    assert not any(p.requires_grad for p in base.values())
    assert row["critic/grad_norm"] > 0
    pack.close()


@pytest.mark.parametrize("rank", [0, 4])
def test_full_fine_tuning_of_the_policy_with_a_critic(
    ppo: MakeRecipe, new_run: MakeRun, rank: int
) -> None:
    full = [
        "trainer.policy.model.lora.rank=0",
        "trainer.policy.model.lora.sync=merge",
        "trainer.policy.optimizer_config.lr=1e-4",
        "trainer.algorithm.use_kl_in_reward=true",
    ]
    recipe = ppo(*full, f"trainer.critic.model.lora.rank={rank}")
    pack, member, critic, before, row = _stepped(recipe, new_run(recipe, "run"))
    assert critic.model is not member.policy.model
    for trained_model in member.trained_models:
        changed = [
            not torch.equal(p, before[trained_model.name][name])
            for name, p in trained_model.parameters.items()
        ]
        # A has no gradient in the first update, because B is zero. The critic makes two updates.
        assert all(changed), trained_model.name
    assert row["kl_in_reward"] == pytest.approx(0, abs=1e-6)
    pack.close()


def test_the_shared_base_of_policy_and_critic_does_not_change(
    ppo: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = ppo()
    pack = Pack.open(recipe)
    base = {name: p.detach().clone() for name, p in pack.model.named_parameters()}
    pack.close()
    pack, member, critic, before, _ = _stepped(recipe, new_run(recipe, "run"))
    for trained_model in member.trained_models:
        assert any(
            not torch.equal(p, before[trained_model.name][name])
            for name, p in trained_model.parameters.items()
        )
    after = {
        name.replace(".base_layer", ""): p
        for name, p in pack.model.get_base_model().named_parameters()
    }
    assert all(torch.equal(after[name], p) for name, p in base.items())
    assert not torch.equal(critic.head.weight, before["critic"]["value_head.weight"])
    pack.close()
