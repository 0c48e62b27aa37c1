"""Test that an adapter to start from is read right, and refused where it cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.config import recipe as recipes
from harness.config.digest import recipe_digest
from harness.config.schema import Recipe
from harness.core.errors import UserError
from rltrain.models import adapter_start
from rltrain.models.adapter_files import CONFIG, PICKLE, WEIGHTS, find
from rltrain.models.targets import stored_shapes
from sweeps.study import plan as plans
from sweeps.study.sizing import engine_rank, largest_trials
from tests.recipes import quickstart

KEY, LORA = "trainer.policy.model.lora.adapter_path", "trainer.policy.model.lora"
DEFAULTS = (f"{LORA}.rank=32", f"{LORA}.alpha=32")
Make = Callable[..., Path]


@pytest.fixture
def make(tiny_model_dir: Path, tmp_path: Path) -> Make:
    """Return a function that writes an adapter of the tiny model, with entries of its config."""

    def write(name: str = "adapter", rank: int = 4, **entries: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tensors = {}
        for stored, shape in stored_shapes(str(tiny_model_dir)).items():
            module = stored.removesuffix(".weight")
            if module.endswith(("q_proj", "up_proj")):
                prefix = f"base_model.model.{module}.lora_"
                tensors[f"{prefix}A.weight"] = torch.ones(rank, shape[1])
                tensors[f"{prefix}B.weight"] = torch.ones(shape[0], rank)
        save_file(tensors, folder / WEIGHTS)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "up_proj"],
            "bias": "none",
            **entries,
        }
        (folder / CONFIG).write_text(json.dumps(config))
        return folder

    return write


def composed(path: Path | str, *overrides: str) -> Recipe:
    """Return the quickstart with defaults for its adapter, started from a path."""
    recipe = quickstart([*DEFAULTS, f"{KEY}={path}", *overrides])
    recipe.sweep = None
    return adapter_start.with_adapter(recipe, {})


def refusal(path: Path | str, *overrides: str) -> str:
    """Return the message with which an adapter is refused before anything is loaded."""
    with pytest.raises(UserError) as error:
        adapter_start.check(composed(path, *overrides))
    return str(error.value)


def test_rank_alpha_and_modules_come_from_the_adapter(make: Make) -> None:
    recipe = composed(make())
    lora = recipe.trainer.policy.model.lora
    assert (lora.rank, lora.alpha, lora.target_modules) == (4, 16, ["q_proj", "up_proj"])
    assert recipe.trainer.target_modules == "all-linear"
    adapter_start.check(recipe)
    assert recipes.to_dict(adapter_start.with_adapter(recipe, {})) == recipes.to_dict(recipe)


@pytest.mark.parametrize(
    "override",
    [f"{LORA}.rank=8", f"{LORA}.alpha=8", "trainer.target_modules=mlp", f"{LORA}.rank=0"],
)
def test_a_recipe_that_asks_for_another_adapter_is_refused(make: Make, override: str) -> None:
    key, _, value = override.partition("=")
    message = refusal(make(), override)
    assert f"{key} is not that of the adapter" in message
    assert f"got:     {value}" in message
    assert "allowed:" in message
    assert "fix:" in message


def test_a_default_that_is_given_on_the_command_line_counts_as_asked(make: Make) -> None:
    folder = make()
    overrides = [*DEFAULTS, f"{KEY}={folder}"]
    with pytest.raises(UserError, match="rank is not that of the adapter"):
        adapter_start.compose("quickstart", overrides, sweeps=False)
    own = [f"{LORA}.rank=4", f"{LORA}.alpha=16", f"{KEY}={folder}"]
    assert adapter_start.compose("quickstart", own, sweeps=False).trainer.target_modules


def test_modules_that_are_the_same_by_another_name_are_kept(make: Make) -> None:
    folder = make()
    override = "trainer.target_modules='.*(q_proj|up_proj)'"
    recipe = composed(folder, override)
    assert recipe.trainer.policy.model.lora.target_modules is None
    adapter_start.check(recipe)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"peft_type": "ADALORA"}, "peft_type=ADALORA"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "init changed the base"),
        ({"use_rslora": True, "rank": 8}, "rsLoRA"),
        ({"r": "four"}, "damaged"),
        ({"target_modules": None}, "damaged"),
    ],
)
def test_another_kind_of_adapter_is_refused(make: Make, entries: Any, named: str) -> None:
    message = refusal(make(**entries))
    assert named in message
    assert "got:" in message


def test_rslora_is_kept_exactly_at_a_square_rank(make: Make) -> None:
    lora = composed(make(rank=16, use_rslora=True)).trainer.policy.model.lora
    assert lora.alpha / lora.rank == 16 / math.sqrt(16)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Change an adapter's tensors in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(A), "lacks tensors"),
        (lambda t: (t.pop(A), t.pop(B)), "lacks tensors of modules that it targets"),
        (lambda t: t.update({A: t[A][:2].clone()}), "another shape"),
        (lambda t: t.update({A: t[A].double()}), "another shape or type"),
        (lambda t: t.update({A: torch.ones(4, 7)}), "another base model"),
        (lambda t: t.update({A: t[A] * math.nan}), "NaN"),
        (lambda t: t.update({A: (t[A] * math.inf).bfloat16()}), "NaN or infinite"),
        (lambda t: t.update({A: t[A].half() * math.inf}), "NaN or infinite"),
        (lambda t: t.update({f"x.{A}": t[A].clone()}), "more than A and B"),
        (
            lambda t: t.update({n.replace("q_proj", "v_proj"): t[n].clone() for n in (A, B)}),
            "of modules that it does not target",
        ),
        (lambda t: t.update({n.replace("s.0", "s.9"): t[n].clone() for n in (A, B)}), "no such"),
        (lambda t: t.clear(), "lacks tensors"),
    ],
)
def test_unsound_tensors_are_refused(make: Make, change: Any, named: str) -> None:
    message = refusal(edit(make(), change))
    assert named in message


def test_tensors_of_modules_without_a_target_are_refused(make: Make) -> None:
    folder = make(target_modules=["q_proj"])
    assert "holds tensors of modules that it does not target" in refusal(folder)


def test_a_truncated_file_is_refused(make: Make) -> None:
    folder = make()
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-10])
    assert "10 bytes are missing" in refusal(folder)
    (folder / WEIGHTS).write_bytes(content[:20])
    assert "damaged" in refusal(folder)


def test_a_pickle_is_never_read(make: Make) -> None:
    folder = make()
    (folder / WEIGHTS).rename(folder / PICKLE)
    assert "pickle" in refusal(folder)


def test_a_folder_without_an_adapter_is_refused_with_what_it_is(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    assert "names no adapter" in refusal(tmp_path / "nowhere")
    assert f"holds no {CONFIG}" in refusal(tmp_path)
    assert "whole model" in refusal(tiny_model_dir)


def test_a_hub_name_without_a_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be had from the hub" in refusal("owner/no-such-adapter")


def test_another_base_of_the_same_shapes_is_noted(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_start.check(composed(make(base_model_name_or_path="owner/other")))
    assert "names another base, owner/other" in capsys.readouterr().out


def test_a_sweep_over_adapters_gives_each_trial_its_own(make: Make) -> None:
    small, large = make("small"), make("large", rank=16)
    space = {KEY: {"choices": [str(small), str(large)]}}
    values = {"sweep.space": space, "sweep.first_trials": []}
    recipe = recipes.with_values(quickstart(DEFAULTS), values)
    plan = plans.build(recipe)
    assert engine_rank(plan) == 16
    assert largest_trials(plan)[0].trainer.policy.model.lora.rank == 16
    assert [plan.refusal(plan.space.point(i)) for i in range(2)] == [None, None]
    trial = adapter_start.with_adapter(plan.recipe, {"sweep": None, **plan.space.point(0)})
    assert trial.trainer.policy.model.lora.rank == 4


def test_a_sweep_over_the_rank_of_a_given_adapter_is_refused(make: Make) -> None:
    space = {f"{LORA}.rank": {"choices": [4, 32]}}
    values = {"sweep.space": space, "sweep.first_trials": [], KEY: str(make())}
    recipe = recipes.with_values(quickstart(DEFAULTS), values)
    with pytest.raises(UserError, match="rank cannot be 32: .* not that of the adapter"):
        plans.build(recipe)


def test_a_recipe_without_an_adapter_keeps_its_digest() -> None:
    recipe = quickstart()
    values = recipes.to_dict(recipe)
    assert values["trainer"]["policy"]["model"]["lora"].pop("adapter_path") is None
    assert values["trainer"].pop("reference") == "base"
    assert recipe_digest(recipes.from_dict(values)) == recipe_digest(recipe)
    other = recipes.with_values(recipe, {"trainer.reference": "start"})
    assert recipe_digest(other) != recipe_digest(recipe)


def test_find_reads_alpha_over_rank(make: Make) -> None:
    start = find(str(make()))
    assert (start.rank, start.alpha, start.targets) == (4, 16, (["q_proj", "up_proj"], None))
