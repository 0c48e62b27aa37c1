from __future__ import annotations

import shlex
from pathlib import Path

from analysis.experiment import Experiment
from harness.config import recipe as recipes
from harness.config.digest import recipe_digest
from harness.config.schema import Recipe
from tests.unit.analysis.synthetic import Sweep, Trial, params, write_run, write_sweep


def composed(command: str) -> str:
    """The digest of the recipe that a `harness.run` command line trains."""
    python, flag, module, source, *overrides = shlex.split(command)
    assert (python, flag, module) == ("python", "-m", "harness.run")
    return _digest(recipes.load(source, overrides))


def digest_of(run_dir: Path) -> str:
    """The digest of the recipe a run directory holds."""
    return _digest(recipes.read(run_dir / "recipe.yaml"))


def _digest(recipe: Recipe) -> str:
    recipe.sweep = None
    return recipe_digest(recipe)


def test_a_trials_command_trains_the_very_same_recipe(
    sweep_dir: Path, experiment: Experiment
) -> None:
    for number in (4, 6):
        command = experiment.command(f"trials/{number:04d}")
        assert composed(command) == digest_of(sweep_dir / "trials" / f"{number:04d}")
    assert "seed=0" in command
    assert """'trainer.target_modules=["q_proj","v_proj"]'""" in command
    assert "generator.max_lora_rank=64" in command


def test_the_sweeps_own_overrides_are_kept_and_its_sweep_keys_dropped(tmp_path: Path) -> None:
    overrides = [
        "trainer.max_steps=20",
        "trainer.policy.optimizer_config.lr=0.5",
        "sweep.num_trials=3",
    ]
    source = tmp_path / "tiny.yaml"
    path = write_sweep(
        tmp_path, Sweep([Trial(0, 7, params(8, 1e-3), 0.9)], seeds=[7], overrides=overrides)
    )
    command = Experiment.open(path).command("trials/0000")
    assert str(source) in command
    assert "trainer.max_steps=20" in command
    assert command.count("trainer.policy.optimizer_config.lr=") == 1
    assert "sweep." not in command
    assert composed(command) == digest_of(path / "trials" / "0000")


def test_what_rank_0_needs_is_in_the_command(tmp_path: Path) -> None:
    values = {**params(0, 1e-4), "trainer.policy.model.lora.sync": "merge"}
    path = write_sweep(tmp_path, Sweep([Trial(0, 0, values, 0.9)], seeds=[0]))
    assert composed(Experiment.open(path).command("trials/0000")) == digest_of(
        path / "trials" / "0000"
    )


def test_a_recipe_that_has_changed_or_gone_gives_way_to_the_saved_one(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, Sweep([Trial(0, 0, params(8, 1e-3), 0.9)], seeds=[0]))
    source, saved = tmp_path / "tiny.yaml", path / "trials" / "0000" / "recipe.yaml"
    source.write_text(
        source.read_text().replace("n_samples_per_prompt: 8", "n_samples_per_prompt: 4")
    )
    for _ in range(2):
        command = Experiment.open(path).command("trials/0000")
        assert f"{saved} trainer.run_name=null trainer.ckpt_path=runs" in command
        assert composed(command) == digest_of(path / "trials" / "0000")
        source.unlink(missing_ok=True)


def test_a_single_runs_command(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    assert composed(Experiment.open(path).command(".")) == digest_of(path)
