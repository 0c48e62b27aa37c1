"""Second names of keys, keys without effect, and placements that are refused early."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import recipe as recipes
from harness.config.recipe_keys import RENAMED, WITHOUT_EFFECT, known_keys
from harness.core.errors import UserError
from rltrain.distributed import placement as parallel

MODEL = "trainer.policy.model.path=somewhere"


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_a_later_name_gets_the_key_here(name: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load("quickstart", [f"{name}=1"])
    assert f"did you mean {RENAMED[name]}?" in str(caught.value)
    assert RENAMED[name] in known_keys()


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_what_has_no_effect_is_taken_with_a_note(name: str, tmp_path: Path) -> None:
    given = f"{name}=true"
    assert recipes.to_dict(recipes.load("quickstart", [given])) == recipes.to_dict(
        recipes.load("quickstart")
    )
    (note,) = recipes.notes([given, "seed=1"])
    assert name in note
    assert WITHOUT_EFFECT[name] in note
    group, key = name.split(".")
    (tmp_path / "mine.yaml").write_text(f"defaults: [base, _self_]\n{group}: {{{key}: true}}\n")
    with pytest.raises(UserError, match="has no effect here"):
        recipes.load(tmp_path / "mine.yaml", [MODEL])


@pytest.mark.parametrize(
    ("second", "own"),
    [
        ("trainer.seed=7", "seed=7"),
        ("trainer.max_prompt_length=77", "generator.max_input_length=77"),
        ("trainer.resume_mode=null", "trainer.resume_mode=none"),
        ("trainer.logger=wandb", "trainer.logger=[wandb]"),
    ],
)
def test_a_second_name_is_the_same_setting(second: str, own: str) -> None:
    one, other = recipes.load("quickstart", [second]), recipes.load("quickstart", [own])
    assert (
        recipes.to_dict(one)
        == recipes.to_dict(other)
        != recipes.to_dict(recipes.load("quickstart"))
    )


PLACEMENT = "trainer.placement"
APART = f"{PLACEMENT}.colocate_all=false"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([f"{PLACEMENT}.policy_num_gpus_per_node=2"], "generator.num_inference_engines=2"),
        (["generator.num_inference_engines=2"], "1 processes, generator.num_inference_engines=2"),
        (
            ["generator.inference_engine_tensor_parallel_size=2"],
            "or trainer.placement.colocate_all=false",
        ),
        ([f"{PLACEMENT}.ref_num_gpus_per_node=2"], "ref_num_gpus_per_node=null"),
        ([f"{PLACEMENT}.critic_num_gpus_per_node=2"], "critic_num_gpus_per_node=null"),
        (
            ["generator.backend=transformers", f"{PLACEMENT}.policy_num_gpus_per_node=2"],
            "generator.backend=vllm",
        ),
        (["generator.backend=transformers", APART], "generator.backend=vllm"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load("quickstart", overrides)
    assert told in str(caught.value)


def test_reference_and_critic_may_say_what_the_policy_says() -> None:
    same = [f"{PLACEMENT}.{role}_num_gpus_per_node=3" for role in ("policy", "ref", "critic")]
    recipes.load("quickstart", [*same, "generator.num_inference_engines=3"])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster is named."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("overrides", "there", "asked"),
    [
        ([f"{PLACEMENT}.device=cuda"], 0, "1 asked (1 ranks), 0 there"),
        ([f"{PLACEMENT}.device=cuda", APART], 1, "2 asked (1 ranks + 1 engines x 1), 1 there"),
        ([f"{PLACEMENT}.device=auto", APART], 1, "2 asked (1 ranks + 1 engines x 1), 1 there"),
        ([f"{PLACEMENT}.device=auto"], 0, None),  # the CPU will do
        (
            [
                f"{PLACEMENT}.device=cpu",
                f"{PLACEMENT}.policy_num_gpus_per_node=2",
                "generator.num_inference_engines=2",
            ],
            0,
            None,
        ),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    there: int,
    asked: str | None,
) -> None:
    monkeypatch.setattr(parallel, "visible_gpus", lambda: there)
    recipe = recipes.load("quickstart", overrides)
    if asked is None:
        parallel.check_placement(recipe)
        return
    with pytest.raises(UserError) as caught:
        parallel.check_placement(recipe)
    assert asked in str(caught.value)


@pytest.mark.parametrize("named_by", ["ray.address", "RAY_ADDRESS"])
def test_several_machines_need_a_cluster(
    alone: None, monkeypatch: pytest.MonkeyPatch, named_by: str
) -> None:
    two = [f"{PLACEMENT}.policy_num_nodes=2", "generator.num_inference_engines=2"]
    recipe = recipes.load("quickstart", two)
    assert parallel.address_of(recipe) is None
    with pytest.raises(UserError, match=r"2 asked, 1 there\n.*ray\.address=HOST:PORT"):
        parallel.check_placement(recipe)
    if named_by == "ray.address":
        recipe = recipes.load("quickstart", [*two, "ray.address=10.0.0.1:6379"])
        monkeypatch.setenv("RAY_ADDRESS", "10.9.9.9:9999")
    else:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert parallel.address_of(recipe) == "10.0.0.1:6379"
    parallel.check_placement(recipe)


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ([], [{"CPU": 1, "GPU": 0}]),
        ([f"{PLACEMENT}.device=cuda"], [{"CPU": 1, "GPU": 1}]),
        (
            [
                "trainer.num_threads=3",
                f"{PLACEMENT}.policy_num_gpus_per_node=2",
                "generator.num_inference_engines=2",
            ],
            [{"CPU": 6, "GPU": 0}],
        ),
        (
            [f"{PLACEMENT}.policy_num_nodes=2", "generator.num_inference_engines=2"],
            [{"CPU": 1, "GPU": 0}] * 2,
        ),
        ([APART, "generator.num_inference_engines=2"], [{"CPU": 1, "GPU": 0}] * 3),
        (
            [
                APART,
                f"{PLACEMENT}.device=cuda",
                "generator.inference_engine_tensor_parallel_size=4",
            ],
            [{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 4}],
        ),
        (
            [APART, "generator.inference_engine_tensor_parallel_size=2"],
            [{"CPU": 1, "GPU": 0}, {"CPU": 2, "GPU": 0}],
        ),
    ],
)
def test_what_is_asked_of_ray(
    alone: None, overrides: list[str], asked: list[dict[str, int]]
) -> None:
    assert parallel.bundles(recipes.load("quickstart", overrides)) == asked


@pytest.mark.parametrize(
    ("gpu", "overrides", "device", "dtype"),
    [
        (False, ["device=auto"], "cpu", "float32"),
        (True, ["device=auto"], "cuda", "bfloat16"),
        (True, ["device=cpu"], "cpu", "float32"),
        (True, ["device=cuda", "dtype=float32"], "cuda", "float32"),
        (False, ["device=cpu", "dtype=bfloat16"], "cpu", "bfloat16"),
    ],
)
def test_where_and_in_what_it_computes(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, overrides: list[str], device: str, dtype: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    groups = {"device": PLACEMENT, "dtype": "trainer.policy.model"}
    recipe = recipes.load("quickstart", [f"{groups[o.split('=')[0]]}.{o}" for o in overrides])
    assert parallel.device_of(recipe).type == device
    assert parallel.dtype_of(recipe) is getattr(torch, dtype)
