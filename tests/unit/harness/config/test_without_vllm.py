"""Recipes that ask for vLLM where it is not installed: where it has no build, and where it is
missing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import run, sweep
from harness.config import recipe as recipes
from harness.config.digest import recipe_digest
from harness.config.schema import Backend
from harness.core import machine
from harness.core.errors import UserError
from harness.records import manifest
from harness.records.run_dir import RunDir
from rltrain.tools.preflight import check_run
from sweeps.study import plan as plans
from sweeps.study import trials
from sweeps.study.study import Trial

NOTE = "note: vLLM has no build for this system: the in-process engine samples"


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux, whose lock has vLLM, without it."""
    monkeypatch.setattr(machine, "has_vllm", lambda: False)
    monkeypatch.setattr(machine, "vllm_has_builds", lambda: True)


@pytest.fixture
def left_out(missing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without builds of vLLM, such as macOS."""
    monkeypatch.setattr(machine, "vllm_has_builds", lambda: False)


@pytest.mark.usefixtures("left_out")
@pytest.mark.parametrize(
    "overrides", [[], ["generator.backend=vllm"], ["generator.backend=transformers"]]
)
def test_the_resolved_recipe_says_what_samples(overrides: list[str], tmp_path: Path) -> None:
    recipe = recipes.load("quickstart", overrides)
    assert recipe.generator.backend is Backend.transformers
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.to_yaml(recipe))
    assert recipes.read(file) == recipe


@pytest.mark.usefixtures("left_out", "tiny_model_dir")
@pytest.mark.parametrize("command", [run.main, sweep.main])
def test_a_dry_run_notes_it(command: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(command)
    assert command(["quickstart", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert NOTE in told


@pytest.mark.usefixtures("tiny_model_dir")
def test_there_is_no_note_where_vllm_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "has_vllm", lambda: True)
    for builds in (True, False):
        monkeypatch.setattr(machine, "vllm_has_builds", lambda builds=builds: builds)
        assert recipes.load("quickstart").generator.backend is Backend.vllm
        assert run.main(["quickstart", "--dry-run", "generator.backend=transformers"]) == 0
    assert NOTE not in capsys.readouterr().out


@pytest.mark.usefixtures("left_out")
def test_trials_and_their_reruns_agree_with_the_sweep(tmp_path: Path) -> None:
    plan = plans.build(recipes.load("quickstart"))
    trial = Trial(0, 0, 1, plan.first_trials[1])
    of_trial = trials.trial_recipe(plan, trial, RunDir(tmp_path))
    assert of_trial.generator.backend is Backend.transformers
    again = recipes.load("quickstart", trials.rerun_overrides(plan, trial, []))
    again.sweep = None
    assert recipe_digest(again) == recipe_digest(of_trial)


def test_a_run_keeps_the_engine_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "has_vllm", lambda: True)
    recipe = recipes.load("quickstart")
    recipe.sweep = None
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(
        recipes.to_yaml(recipe), manifest.build(recipe, kind="run", name="run", source="quickstart")
    )
    written = run_dir.recipe.read_bytes()
    monkeypatch.setattr(machine, "has_vllm", lambda: False)
    monkeypatch.setattr(machine, "vllm_has_builds", lambda: False)
    with pytest.raises(UserError, match="vLLM is not installed") as caught:
        run.main(["--resume", str(run_dir.path)])
    assert caught.value.fix == "use Linux: vLLM has no build for this system"
    assert run_dir.recipe.read_bytes() == written


FOUR = ["trainer.placement.policy_num_gpus_per_node=4", "generator.num_inference_engines=4"]


@pytest.mark.usefixtures("left_out", "tiny_model_dir")
def test_engines_that_transformers_cannot_stand_in_for_are_refused() -> None:
    apart = recipes.load("quickstart", ["trainer.placement.colocate_all=false"])
    assert apart.generator.backend is Backend.vllm
    with pytest.raises(UserError, match="vLLM is not installed") as caught:
        check_run(apart)
    assert "trainer.placement.colocate_all=true" in str(caught.value.allowed)
    with pytest.raises(UserError, match="4 asked"):
        check_run(recipes.load("gsm8k_lora", FOUR))
    with pytest.raises(UserError, match="each training process holds one engine of its own"):
        recipes.load("quickstart", ["generator.num_inference_engines=2"])


@pytest.mark.usefixtures("missing", "tiny_model_dir")
def test_on_linux_a_missing_vllm_is_an_error() -> None:
    recipe = recipes.load("quickstart")
    assert recipe.generator.backend is Backend.vllm
    with pytest.raises(UserError, match="vLLM is not installed") as caught:
        check_run(recipe)
    assert caught.value.fix == "make install, or make install-gpu"
    check_run(recipes.load("quickstart", ["generator.backend=transformers"]))


@pytest.mark.usefixtures("missing", "tiny_model_dir")
def test_a_cluster_has_packages_of_its_own() -> None:
    check_run(recipes.load("quickstart", ["ray.address=10.0.0.1:6379"]))
