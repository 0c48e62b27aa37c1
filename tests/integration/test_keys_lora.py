"""Test every key of `lora` on modules of a real pack, for policy and critic alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from rltrain.algorithms.critic import Critic
from rltrain.algorithms.trained_model import TrainedModel
from rltrain.member import Member
from rltrain.models.loading import adapter_layers
from rltrain.pack import Pack
from rltrain.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[[Recipe, str], RunDir]
Join = Callable[..., TrainedModel]

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PPO = "trainer.algorithm.advantage_estimator=gae"


@pytest.fixture(scope="module")
def packs() -> Iterator[list[Pack]]:
    """Return a list that holds the pack that all members of this file join, once it is open."""
    opened: list[Pack] = []
    yield opened
    for pack in opened:
        pack.close()


@pytest.fixture(params=["policy", "critic"])
def join(
    request: pytest.FixtureRequest, small_recipe: MakeRecipe, new_run: MakeRun, packs: list[Pack]
) -> Iterator[Join]:
    """Return a function that adds a member and returns its policy or its critic.

    The settings are those of the model's `lora`; keys with dots are whole keys.
    """
    members: list[Member] = []

    def make(*settings: str) -> TrainedModel:
        lora = f"trainer.{request.param}.model.lora"
        recipe = small_recipe(
            PPO, *(s if "." in s.split("=")[0] else f"{lora}.{s}" for s in settings)
        )
        if not packs:
            packs.append(Pack.open(recipe, slots=2))
        members.append(packs[0].add(recipe, new_run(recipe, f"run{len(members)}")))
        return {model.name: model for model in members[-1].trained_models}[request.param]

    yield make
    for member in members:
        packs[0].remove(member)


def _layers(model: TrainedModel) -> dict[str, LoraLayer]:
    return adapter_layers(model.model, model.adapter)


@pytest.mark.parametrize("rank", [1, 5])
def test_rank(join: Join, rank: int) -> None:
    model = join(f"rank={rank}")
    assert {layer.lora_A[model.adapter].weight.shape[0] for layer in _layers(model).values()} == {
        rank
    }
    assert {layer.lora_B[model.adapter].weight.shape[1] for layer in _layers(model).values()} == {
        rank
    }


@pytest.mark.parametrize(
    ("rank", "alpha", "factor"), [(4, 8.0, 2.0), (4, 1.0, 0.25), (8, 8.0, 1.0)]
)
def test_alpha_over_rank_scales_the_update(
    join: Join, rank: int, alpha: float, factor: float
) -> None:
    model = join(f"rank={rank}", f"alpha={alpha}")
    layer = next(iter(_layers(model).values()))
    a, b = layer.lora_A[model.adapter].weight, layer.lora_B[model.adapter].weight
    inputs = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(0))
    model.activate()
    with torch.no_grad():
        before = layer(inputs)
        b.fill_(0.01)
        change = layer(inputs) - before
        torch.testing.assert_close(change, factor * inputs @ a.T @ b.T, atol=1e-5, rtol=1e-4)
        assert change.abs().max() > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_acts_only_in_training(join: Join, dropout: float) -> None:
    model = join(f"dropout={dropout}")
    layer = next(iter(_layers(model).values()))
    model.activate()
    inputs = torch.ones(50, layer.lora_A[model.adapter].weight.shape[1])
    with torch.no_grad():
        layer.lora_B[model.adapter].weight.fill_(0.1)
        layer.train()
        assert torch.equal(layer(inputs)[0], layer(inputs)[1]) is (dropout == 0)
        layer.eval()
        assert torch.equal(layer(inputs)[0], layer(inputs)[1])


@pytest.mark.parametrize(
    ("settings", "leaves"),
    [
        ([], LINEAR),
        (["target_modules=attention"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["trainer.target_modules=mlp", "target_modules=[q_proj]"], {"q_proj"}),
        (["trainer.target_modules=mlp"], {"gate_proj", "up_proj", "down_proj"}),
        (["exclude_modules=[q_proj]"], LINEAR - {"q_proj"}),
        (["trainer.exclude_modules=[q_proj]", "exclude_modules=[k_proj]"], LINEAR - {"k_proj"}),
        (["trainer.exclude_modules=[q_proj]"], LINEAR - {"q_proj"}),
    ],
)
def test_target_modules_default_to_those_of_the_trainer(
    join: Join, settings: list[str], leaves: set[str]
) -> None:
    assert {name.rsplit(".", 1)[1] for name in _layers(join(*settings))} == leaves


def test_policy_and_critic_may_have_different_target_modules(join: Join, packs: list[Pack]) -> None:
    model = join("target_modules=[q_proj]")
    other = next(one for one in packs[0].members[-1].trained_models if one is not model)
    assert {name.rsplit(".", 1)[1] for name in _layers(other)} == LINEAR


def test_a_starts_as_init_method_says_and_b_at_zero(join: Join) -> None:
    uniform, normal = join("rank=8", "init_method=kaiming"), join("rank=8", "init_method=gaussian")
    for (_, layer), (_, other) in zip(
        _layers(uniform).items(), _layers(normal).items(), strict=True
    ):
        a, gaussian = layer.lora_A[uniform.adapter].weight, other.lora_A[normal.adapter].weight
        # Kaiming with a = sqrt(5) is uniform up to 1 / sqrt(inputs). PEFT's gaussian has a
        # deviation of 1 / rank.
        bound = a.shape[1] ** -0.5
        assert 0.9 * bound < a.abs().max() <= bound
        assert gaussian.std().item() == pytest.approx(1 / 8, rel=0.15)
        assert not layer.lora_B[uniform.adapter].weight.any()
        assert not other.lora_B[normal.adapter].weight.any()


def _opened(small_recipe: MakeRecipe, new_run: MakeRun, *overrides: str) -> tuple[Pack, Member]:
    recipe = small_recipe(PPO, *overrides)
    pack = Pack.open(recipe)
    member = pack.add(recipe, new_run(recipe, "own"))
    pack.publish(pack.members)
    return pack, member


def _critic_of(member: Member) -> Critic:
    assert member.critic is not None
    return member.critic


@pytest.mark.parametrize("path", ["null", "the policy's"])
def test_a_critic_shares_the_policys_base(
    small_recipe: MakeRecipe, new_run: MakeRun, tiny_model_dir: Path, path: str
) -> None:
    critic_path = "null" if path == "null" else str(tiny_model_dir)
    pack, member = _opened(small_recipe, new_run, f"trainer.critic.model.path={critic_path}")
    critic = _critic_of(member)
    assert critic.model is member.policy.model is pack.model
    weights = dict(critic.model.get_base_model().named_parameters())
    base = sum(p.numel() for name, p in weights.items() if ".lora_" not in name)
    assert base == pack.active_parameters
    critic_parameters = {id(p) for p in critic.parameters.values()}
    assert not critic_parameters & {id(p) for p in member.policy.parameters.values()}
    pack.close()


def test_a_critic_of_another_path_loads_that_base(
    small_recipe: MakeRecipe, new_run: MakeRun, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "another"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("data"))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: 2 * tensor for name, tensor in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    pack, member = _opened(small_recipe, new_run, f"trainer.critic.model.path={folder}")
    critic_norm, policy_norm = (
        model.model.get_base_model().model.norm.weight
        for model in (_critic_of(member), member.policy)
    )
    assert torch.equal(critic_norm, 2 * policy_norm)
    row = train_step(pack, pack.members)[member]
    assert row["critic/grad_norm"] > 0
    assert torch.equal(critic_norm, 2 * policy_norm)  # the trained model's base does not change
    pack.close()
