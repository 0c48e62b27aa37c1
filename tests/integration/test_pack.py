"""Test members of a pack on the real model.

Each trains like a run alone, has the adapter that its recipe asks for, and syncs separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from harness.config.metrics import without_timings
from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.records.run_dir import RunDir
from rltrain.distributed.placement import pack_key, shares_base
from rltrain.distributed.process_group import Ranks
from rltrain.member import Member
from rltrain.models.loading import adapter_layers
from rltrain.pack import Pack
from rltrain.step import train_step
from rltrain.trainer import Trainer
from tests.integration.training import MakeRecipe, MakeRun, assert_equal, train


def test_a_member_of_a_pack_trains_like_a_run_alone(
    small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    settings = [
        ("trainer.policy.model.lora.rank=4", "trainer.target_modules=attention", "seed=3"),
        (
            "trainer.policy.model.lora.rank=8",
            "trainer.policy.optimizer_config.lr=3e-3",
            "generator.n_samples_per_prompt=2",
        ),
    ]
    max_rank = "generator.max_lora_rank=8"
    recipes = [small_recipe(max_rank, *overrides) for overrides in settings]
    pack = Pack.open(recipes[0])
    assert all(
        shares_base(recipe) and pack_key(recipe) == pack_key(recipes[0]) for recipe in recipes
    )
    members = [pack.add(recipe, new_run(recipe, f"m{i}")) for i, recipe in enumerate(recipes)]
    pack.publish(pack.members)
    rows = _two_steps(pack)
    together = [rows[member] for member in members]
    _remove_all(pack, members)
    for recipe, expected in zip(recipes, together, strict=True):
        member = pack.add(recipe, new_run(recipe, f"solo{recipe.seed}"))
        pack.publish(pack.members)
        alone = _two_steps(pack)[member]
        _remove_all(pack, [member])
        assert without_timings(alone) == without_timings(expected)
    pack.close()


def _two_steps(pack: Pack) -> dict[Member, dict[str, float]]:
    for _ in range(2):
        rows = train_step(pack, pack.members)
        for member in pack.members:
            member.step += 1
    return rows


def _remove_all(pack: Pack, members: list[Member]) -> None:
    for member in members:
        pack.remove(member)


def test_a_removed_member_leaves_no_trace_in_the_pack(
    small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = small_recipe("trainer.max_steps=2")
    first, second = new_run(recipe, "first"), new_run(recipe, "second")
    with Trainer(recipe) as trainer:
        for run in (first, second):
            for _ in train(trainer, recipe, run):
                pass
            trainer.remove(run)
            assert not (run.path / "sync").exists()
    assert_equal(first, second)


@pytest.fixture(scope="module")
def open_pack(small_data: list[str]) -> Iterator[Callable[[Recipe], Pack]]:
    opened: list[Pack] = []

    def make(recipe: Recipe) -> Pack:
        opened.append(Pack.open(recipe))
        return opened[-1]

    yield make
    for pack in opened:
        pack.close()


@pytest.mark.parametrize(
    ("targets", "exclude", "leaves"),
    [
        (
            "all-linear",
            "null",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("attention", "null", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", "null", {"gate_proj", "up_proj", "down_proj"}),
        ("[q_proj,up_proj]", "null", {"q_proj", "up_proj"}),
        (
            "all-linear",
            "[q_proj]",
            {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        (r"'.*\.layers\.0\..*(q|k)_proj'", "null", {"q_proj", "k_proj"}),
    ],
)
def test_target_modules_are_those_of_the_recipe(
    small_recipe: MakeRecipe,
    new_run: MakeRun,
    open_pack: Callable[[Recipe], Pack],
    targets: str,
    exclude: str,
    leaves: set[str],
) -> None:
    recipe = small_recipe(f"trainer.target_modules={targets}", f"trainer.exclude_modules={exclude}")
    pack = open_pack(recipe)
    member = pack.add(recipe, new_run(recipe, "run"))
    adapted = adapter_layers(pack.model, member.name)
    assert {name.rsplit(".", 1)[1] for name in adapted} == leaves
    layers = 1 if "layers" in targets else pack.model.config.num_hidden_layers
    assert len(adapted) == len(leaves) * layers
    assert len(member.policy.parameters) == 2 * len(adapted)
    assert all(
        p.requires_grad and p.dtype == torch.float32 for p in member.policy.parameters.values()
    )


def test_a_target_that_matches_nothing_is_refused(
    small_recipe: MakeRecipe, new_run: MakeRun, open_pack: Callable[[Recipe], Pack]
) -> None:
    recipe = small_recipe("trainer.target_modules=[q_proj,query]")
    with pytest.raises(UserError, match=r"names no module.*\n.*query"):
        open_pack(recipe).add(recipe, new_run(recipe, "run"))


def test_non_finite_gradients_are_skipped_then_fail(
    small_recipe: MakeRecipe, new_run: MakeRun, open_pack: Callable[[Recipe], Pack]
) -> None:
    recipe = small_recipe("trainer.max_bad_steps=2")
    member = open_pack(recipe).add(recipe, new_run(recipe, "run"))
    before = [p.clone() for p in member.policy.parameters.values()]

    def step_with_nan() -> dict[str, float]:
        for p in member.policy.parameters.values():
            p.grad = torch.full_like(p, math.nan)
        return member.policy.optimize(Ranks())

    assert step_with_nan()["skipped_updates"] == 1
    assert all(
        torch.equal(p, old)
        for p, old in zip(member.policy.parameters.values(), before, strict=True)
    )
    with pytest.raises(FloatingPointError, match="2 times in a row"):
        step_with_nan()


def test_gradients_are_clipped_to_the_recipes_norm(
    small_recipe: MakeRecipe,
    new_run: MakeRun,
    open_pack: Callable[[Recipe], Pack],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = small_recipe("trainer.policy.optimizer_config.max_grad_norm=0.5")
    member = open_pack(recipe).add(recipe, new_run(recipe, "run"))
    parameters = member.policy.parameters.values()
    norms: list[float] = []

    def step() -> None:
        norms.append(
            math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
        )

    monkeypatch.setattr(member.policy.optimizer, "step", step)
    for p in parameters:
        p.grad = torch.ones_like(p)
    before = math.sqrt(sum(p.numel() for p in member.policy.parameters.values()))
    assert member.policy.optimize(Ranks())["grad_norm"] == pytest.approx(before, rel=1e-5)
    assert norms == [pytest.approx(0.5, rel=1e-3)]
    assert all(p.grad is None for p in member.policy.parameters.values())


def test_too_few_short_prompts_are_explained(
    small_recipe: MakeRecipe, new_run: MakeRun, open_pack: Callable[[Recipe], Pack]
) -> None:
    pack = open_pack(small_recipe())
    shortest = min(
        len(p.prompt_ids) for p in pack.add(small_recipe(), new_run(small_recipe(), "all")).problems
    )
    recipe = small_recipe(f"generator.max_input_length={shortest}", "trainer.train_batch_size=24")
    with pytest.raises(UserError, match="fill a batch"):
        pack.add(recipe, new_run(recipe, "some"))


def test_runs_of_the_same_name_sync_separately(small_recipe: MakeRecipe, tmp_path: Path) -> None:
    shared = tmp_path / "adapters"
    recipe = small_recipe(
        "generator.backend=vllm", f"trainer.policy.model.lora.lora_sync_path={shared}"
    )
    runs = [RunDir(tmp_path / sweep / "0000") for sweep in ("one", "two")]
    pack = Pack.open(recipe, slots=2)
    for run in runs:
        run.create("", {})
        pack.publish_member(pack.add(recipe, run))
        pack.publish_member(pack.members[-1])
    folders = sorted(
        p.relative_to(shared).as_posix().split("/", 1)[1] for p in shared.glob("*/*/*")
    )
    assert folders == ["member0/v000002", "member1/v000002"]
    assert len(list(shared.iterdir())) == 2
    pack.close()
    assert list(shared.iterdir()) == []
