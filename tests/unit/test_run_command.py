"""`python -m harness.run` with bad input: one message, exit status 2, no traceback, nothing heavy imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness import manifest
from harness import recipe as recipes
from harness.paths import PROJECT
from harness.rundir import RunDir, Status


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # An import of torch would be seen: -X importtime names every module on stderr.
    command = [sys.executable, "-X", "importtime", "-m", "harness.run", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


TINY = ["generator.backend=transformers", "trainer.max_steps=1", "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=2", "generator.n_samples_per_prompt=2", "trainer.eval_before_train=false",
        "generator.eval_sampling_params.max_generate_length=2"]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["recipes/quickstart.yaml", "trainer.policy.model.lora.rnak=3"],
            "did you mean trainer.policy.model.lora.rank?",
        ),
        (["recipes/quickstart.yaml", "trainer.policy.model.lora.rank=many"], "cannot take this value"),
        (["recipes/quickstart.yaml", "trainer.policy.optimizer_config.lr=-1"], "out of range"),
        (["recipes/quickstart.yaml", "data.train_data=[nowhere.parquet]"], "nowhere.parquet"),
        (["recipes/quikstart.yaml"], "did you mean recipes/quickstart.yaml?"),
        (["recipes/gsm8k_lora.yaml"], "4 asked"),
        ([], "no recipe was given"),
        (["recipes/quickstart.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["--resume", "recipes"], "not a run directory"),
        (["--resume", "runs/x", "trainer.policy.model.lora.rank=3"], "only where and how it computes may change"),
        (["recipes/quickstart.yaml", "--dry-run", "--resume", "runs/x"], "leave out one of the two"),
        (["recipes/gsm8k_lora.yaml", "generator.run_engines_locally=false"], "engines on other servers"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_exits_2(arguments: list[str], told: str) -> None:
    done = _run(*arguments)
    message = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert done.returncode == 2
    assert told in message
    assert "Traceback" not in message
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "vllm", "ray", "transformers", "peft"}


def test_a_finished_run_is_not_overwritten(tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ["recipes/quickstart.yaml", f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"]
    first = _run(*arguments, *TINY)
    assert first.returncode == 0, first.stderr
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = _run(*arguments, *TINY)
    assert again.returncode == 2
    assert "COMPLETE already" in again.stderr
    other = _run("--resume", str(tmp_path / "run"))
    assert other.returncode == 2
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept


def test_a_run_goes_on_in_other_places(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = recipes.load("quickstart", [*TINY, "trainer.num_threads=1"])
    recipe.sweep = None
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(recipes.to_yaml(recipe), manifest.build(recipe, kind="run", name="run", source="quickstart"))
    done = _run("--resume", str(run_dir.path), "trainer.micro_train_batch_size_per_gpu=1", "trainer.logger=tensorboard")
    assert done.returncode == 0, done.stderr
    assert run_dir.status is Status.COMPLETE
    assert list((run_dir.path / "tensorboard").iterdir())
    assert "step 1/1" not in done.stdout  # the console was not among the loggers


def test_advice_and_settings_without_effect_are_told(tiny_model_dir: Path) -> None:
    done = _run(
        "recipes/quickstart.yaml", "--dry-run", "trainer.target_modules=attention", "generator.async_engine=true"
    )
    assert done.returncode == 0
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert any("generator.async_engine has no effect here" in note for note in notes)
    assert any("attention" in note and "LoRA Without Regret" in note for note in notes)
