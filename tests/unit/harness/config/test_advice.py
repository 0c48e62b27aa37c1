"""Advice before a run: each warning fires where it should and nowhere else, and names value, limit
and source.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.config import recipe as recipes
from harness.config.advice import Advice, adapted_modules, advise, rule_learning_rate
from harness.config.schema import Recipe
from harness.core.paths import PROJECT, RECIPES
from tests.recipes import quickstart

LORA = "trainer.policy.model.lora"
LR = "trainer.policy.optimizer_config.lr"
REGRET, SKYRL = "LoRA Without Regret, Schulman et al. 2025", "SkyRL's LoRA guide"
PPO = "trainer.algorithm.advantage_estimator=gae"


@functools.cache
def loaded(name: str) -> Recipe:
    return recipes.load(name)


def solo(*overrides: str, name: str = "quickstart") -> Recipe:
    """A recipe without its sweep; composing it anew for each case would take most of the time."""
    values = {
        key: yaml.safe_load(value)
        for key, value in (override.split("=", 1) for override in overrides)
    }
    return recipes.with_values(loaded(name), values | {"sweep": None})


@pytest.mark.parametrize(
    "name", sorted(str(p.relative_to(RECIPES)) for p in RECIPES.rglob("*.yaml") if p.stem != "base")
)
def test_shipped_recipes_need_none(name: str) -> None:
    assert advise(loaded(name)) == []
    assert advise(solo(name=name), num_problems=7473, hidden_size=896) == []


def test_the_guides_own_example_needs_none() -> None:
    example = [
        "trainer.train_batch_size=1024",
        "trainer.policy_mini_batch_size=256",
        "generator.n_samples_per_prompt=5",
        f"{LR}=3.0e-5",
        f"{LORA}.rank=32",
        f"{LORA}.alpha=32",
    ]
    assert advise(solo(*example, name="gsm8k_lora"), num_problems=7473) == []


# What fires, at which value and limit, from which source; and the value next to it that does not.
CASES = [
    (
        [f"{LR}=9e-6"],
        [f"{LR}=1e-5"],
        LR,
        ("9e-06", "1e-05", "1e-06", "6.2e-04 at hidden size 128"),
        (REGRET, SKYRL),
    ),
    (
        [f"{LR}=3.2e-3"],
        [f"{LR}=3.0e-3"],
        LR,
        ("0.0032", "3.1e-03", "6.2e-04"),
        (REGRET, "quickstart"),
    ),
    (
        [f"{LORA}.rank=0", f"{LORA}.sync=merge", f"{LR}=2e-5"],
        [f"{LORA}.rank=0", f"{LORA}.sync=merge", f"{LR}=1e-5"],
        LR,
        ("2e-05", "1e-05", "1e-06"),
        (REGRET,),
    ),
    ([f"{LORA}.rank=129"], [f"{LORA}.rank=128"], f"{LORA}.rank", ("129", "128"), (REGRET, SKYRL)),
    ([f"{LORA}.alpha=7"], [f"{LORA}.alpha=8"], f"{LORA}.alpha", ("7", "32"), (REGRET,)),
    ([f"{LORA}.alpha=129"], [f"{LORA}.alpha=128"], f"{LORA}.alpha", ("129", "32"), (REGRET,)),
    (
        [f"{LORA}.dropout=0.05"],
        [f"{LORA}.dropout=0"],
        f"{LORA}.dropout",
        ("0.05", "above 0"),
        (SKYRL, "Yao et al."),
    ),
    (
        ["trainer.target_modules=attention"],
        ["trainer.target_modules=mlp"],
        "trainer.target_modules",
        ("attention", "q_proj, k_proj, v_proj, o_proj"),
        (REGRET, SKYRL),
    ),
    (
        [f"{LORA}.target_modules=[q_proj,v_proj]"],
        [f"{LORA}.target_modules=[q_proj,up_proj]"],
        f"{LORA}.target_modules",
        ("['q_proj', 'v_proj']",),
        (REGRET,),
    ),
    (
        ["trainer.exclude_modules=[gate_proj,up_proj,down_proj]"],
        ["trainer.exclude_modules=[gate_proj,up_proj]"],
        "trainer.target_modules",
        ("all-linear",),
        (REGRET,),
    ),
    (
        ["generator.sampling_params.top_p=0.95"],
        ["generator.eval_sampling_params.top_p=0.95"],
        "generator.sampling_params.top_p",
        ("0.95", "1 (off)"),
        ("Yao et al. 2025",),
    ),
    (
        ["generator.sampling_params.top_k=20"],
        ["generator.eval_sampling_params.top_k=20"],
        "generator.sampling_params.top_k",
        ("20", "-1 (off)"),
        ("Yao et al. 2025",),
    ),
    (
        ["generator.sampling_params.temperature=0.6"],
        ["generator.sampling_params.temperature=0.7"],
        "generator.sampling_params.temperature",
        ("0.6", "0.7 to 1.3"),
        ("SkyRL, TRL and verl",),
    ),
    (
        ["generator.sampling_params.temperature=1.4"],
        ["generator.eval_sampling_params.temperature=0"],
        "generator.sampling_params.temperature",
        ("1.4", "0.7 to 1.3"),
        ("SkyRL, TRL and verl",),
    ),
    (
        ["generator.n_samples_per_prompt=1"],
        ["generator.n_samples_per_prompt=1", PPO],
        "generator.n_samples_per_prompt",
        ("=1", "below 2"),
        ("Shao et al. 2024",),
    ),
    (
        [
            "trainer.train_batch_size=257",
            "trainer.policy_mini_batch_size=257",
            "trainer.max_steps=4",
        ],
        [
            "trainer.train_batch_size=512",
            "trainer.policy_mini_batch_size=256",
            "trainer.max_steps=4",
        ],
        "trainer.policy_mini_batch_size",
        ("257", "2056", "2048", "1280"),
        (REGRET, SKYRL),
    ),
    # Tiny model, rank 8: 61440 parameters, 122880 bits; a step is 128 episodes, 960 steps make as
    # many.
    (
        ["trainer.max_steps=961"],
        ["trainer.max_steps=960"],
        f"{LORA}.rank",
        ("=8", "123008", "122880", "rank 9"),
        (REGRET,),
    ),
    (
        [PPO, "trainer.critic.model.lora.dropout=0.1"],
        ["trainer.critic.model.lora.dropout=0.1"],
        "trainer.critic.model.lora.dropout",
        ("0.1",),
        (SKYRL,),
    ),
    (
        [PPO, "trainer.critic.model.lora.target_modules=attention"],
        [PPO],
        "trainer.critic.model.lora.target_modules",
        ("attention",),
        (REGRET,),
    ),
]


@pytest.mark.parametrize(
    ("fires", "silent", "key", "numbers", "sources"), CASES, ids=[str(case[0]) for case in CASES]
)
def test_each_fires_where_it_should_and_not_next_to_it(
    fires: list[str],
    silent: list[str],
    key: str,
    numbers: tuple[str, ...],
    sources: tuple[str, ...],
) -> None:
    (advice,) = advise(solo(*fires))
    assert advice.key == key
    assert f"{key}=" in advice.text
    assert [number for number in numbers if number not in advice.text] == []
    assert [source for source in sources if source not in advice.source] == []
    assert str(advice) == f"{advice.text} ({advice.source})"
    assert advise(solo(*silent)) == []


def test_several_at_once() -> None:
    keys = [
        a.key
        for a in advise(
            solo(f"{LORA}.rank=256", f"{LORA}.dropout=0.1", "generator.sampling_params.top_p=0.9")
        )
    ]
    assert sorted(keys) == ["generator.sampling_params.top_p", f"{LORA}.dropout", f"{LORA}.rank"]


def test_full_fine_tuning_gets_no_advice_on_adapters() -> None:
    full = [
        f"{LORA}.rank=0",
        f"{LORA}.sync=merge",
        f"{LR}=1e-6",
        f"{LORA}.alpha=1000",
        f"{LORA}.dropout=0.5",
        "trainer.target_modules=attention",
    ]
    assert advise(solo(*full)) == []


def test_what_a_sweep_varies_is_its_own_to_find_out() -> None:
    given = [f"{LR}=1e-7", "trainer.target_modules=attention", f"{LORA}.dropout=0.1"]
    assert [advice.key for advice in advise(quickstart(given))] == [f"{LORA}.dropout"]


def test_the_learning_rate_rule() -> None:
    # 5e-5 * 10 * (2000 / hidden)^p by hand: (2000/4096)^0.781 = 0.57128; (2000/896)^0.0775 =
    # 1.06421.
    assert rule_learning_rate({"model_type": "llama", "hidden_size": 4096}) == pytest.approx(
        2.8564e-4, rel=1e-4
    )
    assert rule_learning_rate({"model_type": "qwen2", "hidden_size": 896}) == pytest.approx(
        5.3210e-4, rel=1e-4
    )
    assert rule_learning_rate({"model_type": "qwen3", "hidden_size": 2000}) == pytest.approx(5e-4)
    assert rule_learning_rate({"model_type": "gpt2", "hidden_size": 768}) is None
    assert rule_learning_rate({"model_type": "llama"}) is None
    # What the quickstart trains with is near the rule for its hidden size of 128.
    tiny = json.loads((PROJECT / "rltrain/assets/tiny_gsm/config.json").read_text())
    rule = rule_learning_rate(tiny)
    assert rule is not None
    assert 0.5 < quickstart().trainer.policy.optimizer_config.lr / rule < 2


def test_a_hub_models_family_is_in_its_name_and_its_size_can_be_given() -> None:
    recipe = solo(
        f"{LR}=1e-3", "trainer.policy.model.path=meta-llama/Llama-3.1-8B", name="gsm8k_lora"
    )
    assert advise(recipe) == advise(recipe, hidden_size=2048) == []
    (advice,) = advise(recipe, hidden_size=8192)
    assert "8.3e-04, 5 times" in advice.text
    assert "1.7e-04 at hidden size 8192" in advice.text


def model_folder(tmp_path: Path, **config: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return f"trainer.policy.model.path={tmp_path}"


def test_a_local_models_config_is_read(tmp_path: Path) -> None:
    path = model_folder(tmp_path, model_type="llama", hidden_size=8192)
    (advice,) = advise(solo(path, f"{LR}=1e-3"))
    assert "1.7e-04 at hidden size 8192" in advice.text
    # A family that the rule was not fitted to: its value at hidden size 2000 stands in.
    assert advise(solo(model_folder(tmp_path, model_type="gpt2", n_embd=768), f"{LR}=2e-3")) == []
    (advice,) = advise(solo(model_folder(tmp_path, model_type="gpt2", n_embd=768), f"{LR}=3e-3"))
    assert "0.0005 at hidden size 2000" in advice.text


def test_a_damaged_or_missing_config_is_for_others_to_report(tmp_path: Path) -> None:
    assert advise(solo(f"trainer.policy.model.path={tmp_path}")) == []
    (tmp_path / "config.json").write_text("{")
    assert advise(solo(f"trainer.policy.model.path={tmp_path}")) == []


def test_capacity_counts_epochs_and_takes_given_numbers() -> None:
    recipe = solo("trainer.epochs=2", "trainer.max_steps=null")
    assert advise(recipe) == []
    # 2 epochs of 7680 problems, 8 samples each: 122880 episodes.
    assert advise(recipe, num_problems=7680) == []
    (advice,) = advise(recipe, num_problems=7696)
    assert "123136 episodes" in advice.text
    (advice,) = advise(solo(), num_parameters=1000)
    assert "1000 parameters hold about 2000" in advice.text


@pytest.mark.parametrize(
    ("targets", "excluded", "expected"),
    [
        ("all-linear", None, "qkvogud"),
        ("attention", ["o_proj"], "qkv"),
        ("mlp", None, "gud"),
        (["q_proj", "down_proj"], None, "qd"),
        (["c_attn"], None, ""),
        (r".*self_attn\.[qv]_proj", None, "qv"),
        ("all-linear", r".*\.mlp\..*", "qkvo"),
        ("q_pro(", None, ""),
    ],
)
def test_modules_as_peft_chooses_them(targets: object, excluded: object, expected: str) -> None:
    assert "".join(name[0] for name in adapted_modules(targets, excluded)) == expected


def test_names_of_another_architecture_get_no_advice_on_coverage() -> None:
    assert advise(solo("trainer.target_modules=[c_attn]")) == []


def test_importing_it_loads_no_deep_learning_stack() -> None:
    code = (
        "import sys, harness.config.advice; "
        "print({'torch', 'transformers', 'peft', 'ray', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_advice_reads_as_one_line() -> None:
    everything = [advice for case in CASES for advice in advise(solo(*case[0]))]
    assert all(
        isinstance(advice, Advice) and "\n" not in str(advice) and "  " not in str(advice)
        for advice in everything
    )
