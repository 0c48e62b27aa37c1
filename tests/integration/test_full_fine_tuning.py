"""Test that full fine-tuning trains every weight and keeps small updates."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from rltrain.distributed.placement import shares_base
from rltrain.trainer import Trainer
from tests.integration.training import MakeRecipe, MakeRun, rows, train


def test_full_fine_tuning_trains_every_weight(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe(
        "trainer.policy.model.lora.rank=0",
        "trainer.policy.model.lora.sync=merge",
        "trainer.max_steps=2",
        "trainer.algorithm.use_kl_loss=true",
        "trainer.policy.optimizer_config.lr=1e-4",
    )
    run = new_run(recipe, "full")
    trainer = Trainer(recipe)
    pack = trainer.pack
    before = {name: p.clone() for name, p in pack.model.named_parameters()}
    for _ in train(trainer, recipe, run):
        pass
    assert all(not torch.equal(p, before[name]) for name, p in pack.model.named_parameters())
    assert not shares_base(recipe)
    assert rows(run)[-1]["kl"] > 0
    saved = load_file(run.adapter / "final" / "model.safetensors")
    assert torch.equal(
        saved["model.norm.weight"], dict(pack.model.named_parameters())["model.norm.weight"]
    )
    trainer.close()


def test_full_fine_tuning_in_bfloat16_keeps_small_updates(
    small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = small_recipe(
        "trainer.policy.model.lora.rank=0",
        "trainer.policy.model.lora.sync=merge",
        "trainer.max_steps=1",
        "trainer.policy.model.dtype=bfloat16",
        "trainer.policy.optimizer_config.lr=1e-6",
    )
    run = new_run(recipe, "full")
    trainer = Trainer(recipe)
    pack = trainer.pack
    before = {name: p.clone() for name, p in pack.model.named_parameters()}
    assert list(train(trainer, recipe, run))
    matrices = {name: p for name, p in pack.model.named_parameters() if p.dim() == 2}
    # A bfloat16 weight of 0.02 cannot change by less than 6e-5.
    assert all(0 < (p - before[name]).abs().max() < 1e-5 for name, p in matrices.items())
    saved = load_file(run.adapter / "final" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved.values())
    trainer.close()
