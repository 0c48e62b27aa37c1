"""Target modules are checked against the names in a model's files before it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.config import recipe as recipes
from harness.core.errors import UserError
from rltrain.models.targets import (
    Modules,
    adapted_experts,
    check_adapters,
    check_modules,
    modules,
    resolve,
    stored_modules,
)
from rltrain.tools.preflight import check_run
from sweeps.study.space import from_recipe
from tests.recipes import quickstart

KEY = "trainer.target_modules"
GPT2 = [f"h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


@pytest.fixture
def known(tiny_model_dir: Path) -> Modules:
    found = stored_modules(str(tiny_model_dir))
    assert found is not None
    return found


def told(wanted: Any, known: Modules, key: str = KEY) -> str:
    """Return the message about a value; "" if it is accepted."""
    try:
        check_modules(key, wanted, known)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "wanted",
    [
        "all-linear",
        "attention",
        "mlp",
        ["q_proj", "lm_head"],
        ["layers.0.mlp.up_proj"],
        ["embed_tokens"],
        ".*_proj",
        r"model\.layers\.(0|1)\..*_proj",
        None,
    ],
)
def test_modules_that_are_there(known: Modules, wanted: Any) -> None:
    assert told(wanted, known) == ""


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("attn", ["got:     attn", "q_proj", "did you mean attention for attn?"]),
        ("all_linear", ["did you mean all-linear for all_linear?"]),
        ("q_proj", ["did you mean [q_proj], a list"]),
        (["q_proj", "query", "up_prj"], ["got:     query, up_prj", "up_proj for up_prj"]),
        (["attention"], ["attention alone, not in a list"]),
        (["self_attn"], ["names no module"]),
        (["norm"], ["names no module"]),
        (".*attn.*", ["no matrix to adapt", "model.layers.0.self_attn, 3 in all"]),
        (r"layers\.0", ["names no module"]),
    ],
)
def test_modules_that_are_not(known: Modules, wanted: Any, said: list[str]) -> None:
    message = told(wanted, known)
    assert KEY in message
    assert all(part in message for part in said), message


def test_another_familys_names() -> None:
    known = modules(GPT2, ["h.0.ln_1"])
    assert resolve("attention", known) == ["attn.c_proj", "c_attn"]
    assert resolve("mlp", known) == ["c_fc", "mlp.c_proj"]
    assert "allowed: all-linear, a regex of whole names, or a list of these: c_attn" in told(
        ["q_proj"], known
    )
    # The file leaves out the name of the body, which PEFT's regex is to match.
    assert told(r"transformer\.h\.0\.attn\.c_attn", known) == ""


def test_a_set_that_a_model_does_not_have() -> None:
    known = modules(["decoder.layers.0.fc1", "decoder.layers.0.fc2"], [])
    message = told("mlp", known)
    assert "got:     mlp" in message
    assert "fc1, fc2" in message
    assert "alone" not in message


MIXTURE = modules(
    ["l.0.self_attn.q_proj", "lm_head"],
    ["l.0.mlp.gate", "l.0.mlp.experts"],
    ["l.0.mlp.experts.gate_up_proj", "l.0.mlp.experts.down_proj"],
)


@pytest.mark.parametrize(
    ("targets", "excluded", "names", "experts"),
    [
        ("all-linear", None, ["q_proj"], True),
        ("all-linear", "experts", ["q_proj"], False),
        ("mlp", None, [], True),
        ("experts", None, [], True),
        ("attention", None, ["q_proj"], False),
        (["q_proj"], None, ["q_proj"], False),
    ],
)
def test_named_sets_of_a_mixture(
    targets: Any, excluded: str | None, names: list[str], experts: bool
) -> None:
    assert told(targets, MIXTURE) == ""
    assert resolve(targets, MIXTURE) == names
    parameters = ["experts.down_proj", "experts.gate_up_proj"] if experts else []
    assert adapted_experts(targets, excluded, MIXTURE) == parameters


def test_a_dense_model_has_no_experts(known: Modules) -> None:
    assert "got:     experts" in told("experts", known)


@pytest.mark.parametrize(
    ("overrides", "more", "said"),
    [
        ([], [], ""),
        (["trainer.policy.model.lora.dropout=0.1"], [], "have no dropout"),
        (
            ["trainer.placement.policy_num_gpus_per_node=2", "generator.num_inference_engines=2"],
            [],
            "trained by one process",
        ),
        ([], ["l.0.mlp.shared_expert.up_proj"], "l.0.mlp.shared_expert.up_proj"),
        ([], ["l.1.mlp.down_proj"], "l.1.mlp.down_proj"),
        (["trainer.target_modules=experts"], ["l.1.mlp.down_proj"], ""),
        (["trainer.target_modules=attention", "trainer.policy.model.lora.dropout=0.1"], [], ""),
    ],
)
def test_what_peft_does_not_adapt_beside_experts_is_refused(
    overrides: list[str], more: list[str], said: str
) -> None:
    recipe = quickstart(overrides)
    known = modules([*MIXTURE.matrices, *more], MIXTURE.others, MIXTURE.experts)
    if said:
        with pytest.raises(UserError, match=said):
            check_adapters(recipe, known)
    else:
        check_adapters(recipe, known)


def test_exclusions_must_name_a_module_too(known: Modules) -> None:
    assert "got:     o_prj" in told(["v_proj", "o_prj"], known, "trainer.exclude_modules")
    assert told(["mlp.up_proj"], known, "trainer.exclude_modules") == ""


def test_a_damaged_file_tells_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    for content in (
        b"",
        b"\xff" * 40,
        (2).to_bytes(8, "little") + b"[]",
        (5).to_bytes(8, "little") + b'{"a":',
    ):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert stored_modules(str(tmp_path)) is None
    assert stored_modules("owner/there-is-no-such-model") is None


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["trainer.target_modules=attn"], "trainer.target_modules"),
        (
            ["trainer.policy.model.lora.target_modules=[wq]"],
            "trainer.policy.model.lora.target_modules",
        ),
        (["trainer.exclude_modules=[wq]"], "trainer.exclude_modules"),
        (
            [
                "trainer.algorithm.advantage_estimator=gae",
                "trainer.critic.model.lora.target_modules=[wq]",
            ],
            "trainer.critic.model.lora.target_modules",
        ),
    ],
)
def test_a_run_is_refused_before_anything_is_loaded(
    tiny_model_dir: Path, overrides: list[str], key: str
) -> None:
    with pytest.raises(UserError, match=f"{key} names no module of the model"):
        check_run(quickstart(overrides))
    check_run(
        quickstart(
            [*overrides, "trainer.policy.model.lora.rank=0", "trainer.critic.model.lora.rank=0"]
        )
    )


def test_a_critics_own_model_has_its_own_modules(tiny_model_dir: Path, tmp_path: Path) -> None:
    critic = Path(
        shutil.copytree(tiny_model_dir, tmp_path / "critic", ignore=shutil.ignore_patterns("data"))
    )
    header = json.dumps(
        {"h.0.c_attn.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    ).encode()
    (critic / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(16)
    )
    own = ["trainer.algorithm.advantage_estimator=gae", f"trainer.critic.model.path={critic}"]
    with pytest.raises(UserError, match="names no module of the model\n  got:     q_proj"):
        check_run(quickstart([*own, "trainer.critic.model.lora.target_modules=[q_proj]"]))
    check_run(quickstart([*own, "trainer.critic.model.lora.target_modules=[c_attn]"]))


def test_a_sweeps_choices_are_matched_too(tiny_model_dir: Path) -> None:
    space = {"trainer.target_modules": {"choices": ["mlp", ["q_proj", "wk"]]}}
    with pytest.raises(
        UserError, match=r"sweep\.space: trainer\.target_modules names no module of the model"
    ):
        from_recipe(
            recipes.with_values(quickstart(), {"sweep.space": space, "sweep.first_trials": []})
        )
