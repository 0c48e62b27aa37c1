"""Test how a run chooses, tries and records the size of its micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import recipe as recipes
from harness.config.digest import is_recipe_digest, older_digest, recipe_digest
from harness.records import manifest
from harness.records.run_dir import RunDir
from rltrain import micro_batch_size
from rltrain.algorithms.critic import Critic
from rltrain.algorithms.policy import Policy
from rltrain.algorithms.trained_model import TrainedModel
from rltrain.data.batch import Batch
from rltrain.models import memory
from rltrain.pack import Pack
from rltrain.step import accumulate_gradients
from rltrain.trainer import Trainer
from tests.integration.training import MakeRecipe, MakeRun, Open

AUTO = f"{micro_batch_size.KEY}=auto"


def _stored(run: RunDir) -> Any:
    return recipes.read(run.recipe).trainer.max_tokens_per_microbatch


def test_the_chosen_size_is_stored_in_the_runs_recipe(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(AUTO)
    run = new_run(recipe, "run")
    digest = run.read_manifest()["recipe"]["digest"]
    monkeypatch.setattr(memory, "tokens_that_fit", lambda *_, **__: 512)
    trainer = Trainer(recipe)
    assert _stored(run) == "auto"
    trainer.add(recipe, run)
    pack = trainer.pack
    assert pack.members[0].max_tokens == 512
    assert _stored(run) == 512
    assert is_recipe_digest(digest, recipes.read(run.recipe))
    # Another estimate would fit the next time.
    monkeypatch.setattr(memory, "tokens_that_fit", lambda *_, **__: 64)
    assert pack.add(recipes.read(run.recipe), run).max_tokens == 512
    pack.close()


def test_the_memory_model_gets_free_memory_and_pack_size(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, asked = small_recipe(AUTO), []

    def fits(recipe: Any, shape: Any, free: float, *, on_gpu: bool, members: int) -> int:
        asked.append((shape.hidden, free, on_gpu, members))
        return 128

    monkeypatch.setattr(memory, "tokens_that_fit", fits)
    pack = Pack.open(recipe, slots=3)
    for name in ("one", "two"):
        pack.add(recipe, new_run(recipe, name))
    # Measured once: an earlier member does not shrink the next one's micro-batches.
    assert len(set(asked)) == 1
    hidden, free, on_gpu, members = asked[0]
    assert (hidden, on_gpu, members) == (pack.model.config.hidden_size, False, 3)
    assert free > 2**28
    pack.close()


def test_an_unknown_architecture_has_a_bound_too(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "shape_of", lambda path: None)
    assert opened(AUTO)[1].max_tokens == 2048


@pytest.mark.parametrize("critic", [False, True])
def test_a_micro_batch_shrinks_until_it_fits(
    opened: Open, monkeypatch: pytest.MonkeyPatch, critic: bool
) -> None:
    ppo = ["trainer.algorithm.advantage_estimator=gae"] * critic
    pack, member = opened(AUTO, "trainer.micro_train_batch_size_per_gpu=null", *ppo)
    before = {name: p.detach().clone() for name, p in member.policy.parameters.items()}
    sizes: dict[type, list[int]] = {Policy: [], Critic: []}
    for kind in sizes:
        _fail_above(kind, 700, sizes[kind], monkeypatch)
    micro_batch_size.try_largest_micro_batch(pack, member, accumulate_gradients)
    # Sequences of 128 + 64 tokens: 10 of them, then half, then half again.
    assert member.max_tokens is not None
    assert member.max_tokens <= 700
    tried = sizes[Critic if critic else Policy]
    assert tried[0] == 10 * (128 + 64)
    assert tried == sorted(tried, reverse=True)
    assert bool(sizes[Critic]) is critic
    assert all(torch.equal(p, before[name]) for name, p in member.policy.parameters.items())
    assert all(
        p.grad is None for trained in member.trained_models for p in trained.parameters.values()
    )
    assert not member.policy.optimizer.state
    assert not pack.model.training


def _fail_above(
    kind: type[TrainedModel], most: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss: Any = kind.loss

    def failing(self: TrainedModel, micro: Batch, totals: Any) -> Any:
        sizes.append(micro.packed_tokens)
        if micro.packed_tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(self, micro, totals)

    monkeypatch.setattr(kind, "loss", failing)


def test_each_micro_batch_size_is_tried_once_on_a_gpu(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Pack.open(small_recipe(AUTO), slots=3)
    tried: list[int | None] = []
    monkeypatch.setattr(
        micro_batch_size,
        "try_largest_micro_batch",
        lambda _, member, *__: tried.append(member.max_tokens),
    )
    for index, tokens in enumerate([512, 256, 1024, 1024]):
        monkeypatch.setattr(memory, "tokens_that_fit", lambda *_, tokens=tokens, **__: tokens)
        recipe = small_recipe(AUTO)
        member = pack.add(recipe, new_run(recipe, f"run{index}"))
        with monkeypatch.context() as patched:
            patched.setattr(pack, "device", torch.device("cuda"))
            micro_batch_size.settle_micro_batch_size(pack, member, accumulate_gradients)
    assert tried == [512, 1024]
    pack.close()


def test_an_old_digest_that_includes_the_micro_batch_size_is_accepted(tmp_path: Path) -> None:
    recipe = recipes.load("quickstart")
    old = older_digest(recipe)
    assert old != recipe_digest(recipe)
    assert is_recipe_digest(old, recipe)
    assert is_recipe_digest(recipe_digest(recipe), recipe)
    other = recipes.load("quickstart", ["seed=1"])
    assert not is_recipe_digest(old, other)
    assert not is_recipe_digest(recipe_digest(recipe), other)
    record = manifest.build(recipe, kind="run", name="x", source="test")
    assert is_recipe_digest(
        record["recipe"]["digest"], recipes.with_values(recipe, {micro_batch_size.KEY: 77})
    )
