"""Composing and validating recipes, and what a user is told about a wrong one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.config.validate import engine_lora_rank, sync_mode
from harness.core.errors import UserError
from harness.core.paths import PROJECT, RECIPES
from tests.recipes import quickstart

MODEL = "trainer.policy.model.path=somewhere"


def test_base_lists_every_key_with_the_schemas_default() -> None:
    written = yaml.safe_load((RECIPES / "base.yaml").read_text())
    assert written == recipes.to_dict(Recipe())


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_composes(path: Path) -> None:
    assert recipes.load(path, [MODEL]).trainer.policy.model.path == "somewhere"


def test_gsm8k_recipe_has_the_guides_numbers() -> None:
    recipe = recipes.load("recipes/gsm8k_lora.yaml")
    lora, generator = recipe.trainer.policy.model.lora, recipe.generator
    assert (lora.rank, lora.alpha, recipe.trainer.policy.optimizer_config.lr) == (32, 32, 3e-5)
    assert (recipe.trainer.train_batch_size, generator.n_samples_per_prompt) == (128, 4)
    assert (generator.sampling_params.max_generate_length, generator.num_inference_engines) == (
        1024,
        1,
    )
    assert recipe.trainer.algorithm.use_kl_loss
    assert recipe.trainer.placement.colocate_all
    assert recipe.trainer.strategy.name == "fsdp2"


def test_overrides_win_over_the_file() -> None:
    recipe = recipes.load(
        "quickstart", ["trainer.policy.optimizer_config.lr=1e-5", "trainer.target_modules=[q_proj]"]
    )
    assert recipe.trainer.policy.optimizer_config.lr == 1e-5
    assert recipe.trainer.target_modules == ["q_proj"]


def test_users_recipe_outside_the_project_inherits_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [base, _self_]\nseed: 7\ntrainer: "
        "{policy: {model: {path: m, lora: {rank: 4}}}}\n"
    )
    recipe = recipes.load(tmp_path / "mine.yaml")
    assert (
        recipe.seed,
        recipe.trainer.policy.model.lora.rank,
        recipe.trainer.train_batch_size,
    ) == (7, 4, 128)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainer.policy.model.lora.rnak=3", "did you mean trainer.policy.model.lora.rank?"),
        (
            "generator.inference_engine.num_engines=2",
            "did you mean generator.num_inference_engines?",
        ),
        ("lr=1e-3", "did you mean trainer.policy.optimizer_config.lr?"),
        ("learning_rate=1e-3", "did you mean trainer.policy.optimizer_config.lr?"),
        ("trainer.critic.learning_rate=1e-3", "did you mean trainer.critic.optimizer_config.lr?"),
        ("lora_r=8", "did you mean trainer.policy.model.lora.rank?"),
        ("max_new_tokens=64", "did you mean generator.sampling_params.max_generate_length?"),
        (
            "trainer.policy.model.lora.rank=abc",
            "trainer.policy.model.lora.rank cannot take this value",
        ),
        ("trainer.policy.model.lora.rank=-1", ">= 0 and <= 512"),
        ("trainer.policy.optimizer_config.lr=nan", "out of range"),
        ("trainer.strategy=fsdp", "fsdp2"),
        ("+trainer.policy.model.lora.rank=3", "neither add nor delete"),
        ("~trainer.seed", "neither add nor delete"),
        ("seed=1,2", "sweep.space"),
        ("seed", "key=value"),
        ("trainer=4", "trainer is a group of keys"),
        ("trainer.policy_mini_batch_size=100", "must divide"),
        ("trainer.policy.model.lora.init_method=pissa", "changes the base weights"),
        ("trainer.target_modules=[]", "all-linear"),
        ("generator.sampling_params.temperature=0", "nothing to learn from"),
        ("generator.sampling_params.top_k=0", "-1 (off)"),
        ("trainer.policy.optimizer_config.betas=[0.9]", "two numbers"),
        ("generator.max_lora_rank=4", "above generator.max_lora_rank"),
        ("trainer.seed=5 ", None),
    ],
)
def test_a_wrong_override_is_explained(override: str, told: str | None) -> None:
    if told is None:
        assert recipes.load("quickstart", [override]).seed == 5
        return
    with pytest.raises(UserError) as caught:
        recipes.load("quickstart", [override])
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.policy.model.lora.rank=abc", "trainer.policy.model.lora.rank"),
        ("trainer.policy.optimizer_config.lr=inf", "trainer.policy.optimizer_config.lr"),
        ("trainer.logger=[printer]", "trainer.logger"),
        ("sweep.seeds=[a]", "sweep.seeds"),
        ("trainer.project_name='${nowhere}'", "trainer.project_name"),
    ],
)
def test_a_mistake_is_blamed_on_where_it_was_made(tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load("quickstart", [override])
    assert f"the command line: {key}" in str(caught.value)
    assert "quickstart" not in str(caught.value)
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump({"defaults": ["quickstart", "_self_"]}) + "trainer: {max_steps: many}\n"
    )
    with pytest.raises(UserError, match=f"{file}: trainer.max_steps cannot take this value"):
        recipes.load(file, ["trainer.policy.model.lora.rank=3"])
    with pytest.raises(
        UserError, match=r"the command line: trainer\.max_steps cannot take this value"
    ):
        recipes.with_overrides(quickstart(), ["trainer.max_steps=many"])


RANK, ALPHA = "trainer.policy.model.lora.rank", "trainer.policy.model.lora.alpha"
SWEPT = (
    "  space: "
    f"{{{RANK}: {{choices: [2, 8]}}, generator.engine_args: {{choices: [{{a: 1}}, {{a: 2}}]}}}}\n"
)


@pytest.mark.parametrize(
    ("text", "reader", "key"),
    [
        (f"trainer: {{policy: {{model: {{lora: {{alpha: '${{{RANK}}}'}}}}}}}}", ALPHA, RANK),
        ("trainer: {policy: {model: {lora: {alpha: '${.rank}'}}}}", ALPHA, RANK),
        ("trainer: {policy: {model: {lora: {alpha: '${..lora.rank}'}}}}", ALPHA, RANK),
        (f"trainer: {{project_name: 'rank-${{{RANK}}}'}}", "trainer.project_name", RANK),
        (
            (
                "trainer: {project_name: '${.critic.model.path}', "
                f"critic: {{model: {{path: 'x${{{RANK}}}'}}}}}}"
            ),
            "trainer.critic.model.path",
            RANK,
        ),
        (
            "trainer: {max_steps: '${generator.engine_args.a}'}",
            "trainer.max_steps",
            "generator.engine_args",
        ),
        ("trainer: {project_name: 'seed-${seed}'}", "trainer.project_name", "seed"),
        (
            "generator: {engine_args: {lora: '${trainer.policy.model.lora}'}}",
            "generator.engine_args.lora.rank",
            RANK,
        ),
        (
            f"  space: {{{ALPHA}: {{choices: [8, '${{{RANK}}}']}}, {RANK}: {{choices: [2, 8]}}}}",
            f"sweep.space.{ALPHA}.choices",
            RANK,
        ),
        (
            f"  space: {{{ALPHA}: {{low: '${{{RANK}}}', high: 64}}, {RANK}: {{choices: [2, 8]}}}}",
            f"sweep.space.{ALPHA}.low",
            RANK,
        ),
        (
            f"  first_trials: [{{{RANK}: 2, {ALPHA}: '${{{RANK}}}'}}]\n{SWEPT}",
            "sweep.first_trials",
            RANK,
        ),
    ],
)
def test_an_interpolation_of_a_swept_key_is_refused(
    tmp_path: Path, text: str, reader: str, key: str
) -> None:
    file, own = tmp_path / "mine.yaml", text.startswith(" ")
    head = "defaults: [base, _self_]\n"
    file.write_text(f"{head}sweep:\n{text if own else SWEPT}\n{'' if own else text}\n")
    given = [MODEL, "generator.engine_args={a:1}"] if "engine_args: {lora" not in text else [MODEL]
    with pytest.raises(UserError) as caught:
        recipes.load(file, given)
    assert (
        f"{reader} reads {key}, which sweep.{'seeds' if key == 'seed' else 'space'} varies"
        in str(caught.value)
    )
    assert "${" in str(caught.value)
    if "critic" not in text and "engine_args: {lora" not in text:
        assert recipes.load(file, given, sweeps=False)


def test_other_interpolations_are_resolved(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (
        "trainer: "
        f"{{max_steps: '${{trainer.train_batch_size}}', critic_mini_batch_size: '${{{RANK}}}'}}\n"
    )
    off = (
        f"sweep: {{space: {{{RANK}: null, {ALPHA}: {{choices: [8, '${{trainer.max_steps}}']}}}}}}\n"
    )
    file.write_text(f"defaults: [base, _self_]\n{text}{off}")
    recipe = recipes.load(file, [MODEL])
    assert (recipe.trainer.max_steps, recipe.trainer.critic_mini_batch_size) == (128, 32)
    assert recipe.sweep is not None
    assert recipe.sweep.space[ALPHA] == {"choices": [8, 128]}


@pytest.mark.parametrize(
    ("key", "value"), [("seed", False), ("seed", 0.0), ("trainer.algorithm.gamma", True)]
)
def test_what_equals_the_default_must_have_its_type(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{key}.* cannot take this value"):
        recipes.with_values(quickstart(), {key: value})


def test_seed_given_twice_and_differently_is_refused() -> None:
    with pytest.raises(UserError, match="given twice"):
        recipes.load("quickstart", ["seed=1", "trainer.seed=2"])


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        recipes.load("recipes/quikstart.yaml")
    assert "did you mean recipes/quickstart.yaml?" in str(caught.value)


def test_model_path_must_be_set() -> None:
    with pytest.raises(UserError, match=r"trainer\.policy\.model\.path must be set"):
        recipes.load("base")


def test_typo_inside_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\ntrainer: {max_step: 3}\n")
    with pytest.raises(UserError, match="did you mean trainer.max_steps"):
        recipes.load(tmp_path / "mine.yaml", [MODEL])


def test_broken_yaml_is_explained(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: [unclosed\n")
    with pytest.raises(UserError, match="cannot compose"):
        recipes.load(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.target_modules", "all-linear"),
        ("trainer.target_modules", ["q_proj", "up_proj"]),
        ("trainer.target_modules", r".*layers\.(0|1)\..*_proj"),
        ("trainer.policy.optimizer_config.lr", 3.123456789e-5),
        ("trainer.policy.model.lora.rank", 1),
        ("trainer.run_name", None),
        ("trainer.run_name", "1"),
        ("generator.batched", False),
    ],
)
def test_override_reads_back(key: str, value: object) -> None:
    recipe = recipes.load("quickstart", [recipes.override_for(key, value)])
    assert recipes.get(recipe, key) == value


def test_a_stored_recipe_that_was_edited_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.to_yaml(recipes.load("quickstart")).replace("rank: 8", "rank: 4"))
    with pytest.raises(UserError, match="was edited"):
        recipes.read(file)


def test_with_values_changes_a_copy() -> None:
    recipe = recipes.load("quickstart")
    changed = recipes.with_values(recipe, {"trainer.policy.model.lora.rank": 4, "seed": 9})
    assert (changed.trainer.policy.model.lora.rank, changed.seed) == (4, 9)
    assert recipe.trainer.policy.model.lora.rank == 8
    with pytest.raises(UserError):
        recipes.with_values(recipe, {"trainer.policy.model.lora.rank": -4})


@pytest.mark.parametrize(
    ("rank", "served"), [(1, 1), (4, 8), (8, 8), (9, 16), (100, 128), (512, 512)]
)
def test_engine_rank_is_one_vllm_serves(rank: int, served: int) -> None:
    assert (
        engine_lora_rank(recipes.load("quickstart", [f"trainer.policy.model.lora.rank={rank}"]))
        == served
    )


def test_composing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from harness.config import recipe; from rltrain.tools.preflight "
        "import check_run; recipe.load('quickstart');"
        "print(sorted({'torch', 'vllm', 'ray', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({}, "memory"),
        ({"rank": 0}, "merge"),
        ({"lora_sync_path": "/tmp/adapters"}, "disk"),
        ({"sync": "disk"}, "disk"),
        ({"sync": "merge"}, "merge"),
    ],
)
def test_a_sync_left_open_is_the_fastest_that_serves_the_policy(
    settings: dict[str, object], mode: str
) -> None:
    overrides = [
        recipes.override_for(f"trainer.policy.model.lora.{key}", value)
        for key, value in settings.items()
    ]
    assert sync_mode(recipes.load("quickstart", overrides).trainer.policy.model.lora).name == mode


def test_an_adapter_to_send_and_none_there_is_said() -> None:
    none = ["trainer.policy.model.lora.rank=0", "trainer.policy.model.lora.sync=disk"]
    with pytest.raises(UserError, match=r"(?s)no adapter to send.*sync=merge"):
        recipes.load("quickstart", none)
