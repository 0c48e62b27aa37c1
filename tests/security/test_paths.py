"""Test where a recipe's names lead: run directory and adapter folder stay where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.core.errors import UserError
from harness.records.run_dir import RunDir, run_dir_for

NAME = "trainer.run_name"
ESCAPES = [
    "../../etc",
    "..",
    ".",
    "",
    "/etc",
    "/",
    "a/b",
    "a/../../b",
    "./a",
    "a/",
    "~/a/b",
    "..\\..\\etc",
    "a\\b",
    "C:\\a",
    "a\0b",
    "\0",
    "a\nb",
    "a\rb",
    "\x1b[2J",
    "\u202egnp.exe",
    "\ud800",
    ".hidden",
    ".lock",
    "x" * 300,
    "é" * 150,
]


@pytest.fixture(scope="module")
def base() -> Recipe:
    return recipes.load("quickstart")


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
@pytest.mark.claim("Names lead nowhere else")
def test_a_run_name_that_is_a_path_is_refused(base: Recipe, name: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.with_values(base, {NAME: name})
    error = caught.value
    assert NAME in error.what
    assert error.got is not None
    str(error).encode()
    if "holds a character" not in error.what:
        assert error.allowed
        assert error.fix


@pytest.mark.parametrize(
    "name", ["run", "run 2", "lr=1e-3,rank=8", "...".join("ab"), "é", "-x", "a:b", "100%", "~a"]
)
def test_other_names_are_accepted(base: Recipe, name: str, tmp_path: Path) -> None:
    recipe = recipes.with_values(base, {NAME: name, "trainer.ckpt_path": str(tmp_path)})
    assert run_dir_for(recipe, "x.yaml").path == tmp_path / name


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    name=st.text(max_size=12)
    | st.lists(st.sampled_from(["..", ".", "/", "a", "\\", "~", " "])).map("".join)
)
@pytest.mark.claim("Names lead nowhere else")
def test_a_run_is_created_in_its_ckpt_path(base: Recipe, name: str) -> None:
    try:
        recipe = recipes.with_values(base, {NAME: name, "trainer.ckpt_path": "/tmp/runs"})
    except UserError:
        return
    assert run_dir_for(recipe, "x.yaml").path.parent == Path("/tmp/runs").resolve()


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_both_commands_refuse_a_path_before_they_write(command: str, tmp_path: Path) -> None:
    from harness import run, sweep

    folder = tmp_path / "there"
    with pytest.raises(UserError, match="not a path"):
        {"run": run, "sweep": sweep}[command].main(
            ["quickstart", f"trainer.ckpt_path={folder}", f"{NAME}=../outside"]
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.claim("Names lead nowhere else")
def test_each_run_syncs_adapters_in_a_separate_folder(base: Recipe, tmp_path: Path) -> None:
    from rltrain.pack import _sync_folder

    recipe = recipes.with_values(base, {"trainer.policy.model.lora.lora_sync_path": str(tmp_path)})
    # Trials of two sweeps have the same names.
    roots = [
        _sync_folder(recipe, RunDir(Path("/runs") / name))
        for name in ("a/trials/0000", "b/trials/0000", "..x", "a b")
    ]
    assert all(root.resolve().parent == tmp_path.resolve() for root in roots)
    assert len(set(roots)) == len(roots)
    without_sync_path = recipes.with_values(
        base, {"trainer.policy.model.lora.lora_sync_path": None}
    )
    assert _sync_folder(without_sync_path, RunDir(tmp_path / "run")).parent == tmp_path / "run"


OUTSIDE = [
    "${oc.env:HF_TOKEN}",
    "${oc.env:HF_TOKEN,none}",
    "a ${ oc.env:HF_TOKEN } b",
    "${oc.decode:${oc.env:HF_TOKEN}}",
    "${a.${oc.env:HF_TOKEN}}",
    "${oc.create:{a:1}}",
    "${hydra:runtime.cwd}",
]


@pytest.mark.parametrize("text", OUTSIDE)
@pytest.mark.claim("A recipe holds only values")
def test_a_recipe_does_not_reach_the_environment(
    base: Recipe, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    file = tmp_path / "mine.yaml"
    file.write_text(f"defaults: [quickstart, _self_]\ntrainer: {{project_name: '{text}'}}\n")
    space = {"trainer.target_modules": {"choices": ["mlp", text]}}
    for attempt in (
        lambda: recipes.load(file),
        lambda: recipes.load("quickstart", [f"trainer.project_name='{text}'"]),
        lambda: recipes.with_values(base, {"trainer.policy.model.path": text}),
        lambda: recipes.with_values(base, {"sweep.space": space}),
    ):
        with pytest.raises(UserError, match="outside the recipe") as caught:
            attempt()
        assert "hf_canary" not in str(caught.value)


def test_a_recipe_may_refer_to_itself(base: Recipe) -> None:
    recipe = recipes.with_values(
        base, {"trainer.policy_mini_batch_size": "${trainer.train_batch_size}"}
    )
    assert recipe.trainer.policy_mini_batch_size == recipe.trainer.train_batch_size
