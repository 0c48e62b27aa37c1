"""Test `python -m harness.run` from the command line with runs that train."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from harness import run
from harness.config import recipe as recipes
from harness.core.errors import UserError
from harness.core.locks import held
from harness.core.paths import PROJECT
from harness.records import manifest
from harness.records.run_dir import RunDir, Status
from tests.recipes import quickstart

TINY = [
    "generator.backend=transformers",
    "trainer.max_steps=1",
    "trainer.train_batch_size=2",
    "trainer.policy_mini_batch_size=2",
    "generator.n_samples_per_prompt=2",
    "trainer.eval_before_train=false",
    "generator.eval_sampling_params.max_generate_length=2",
]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness.run", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


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


def test_a_refused_launch_leaves_no_files(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = Path(
        shutil.copytree(tiny_model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("data"))
    )
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    arguments = [
        "quickstart",
        *TINY,
        "trainer.logger=[console,tensorboard]",
        f"trainer.policy.model.path={model}",
        f"trainer.ckpt_path={tmp_path}",
        "trainer.run_name=run",
    ]
    with pytest.raises(
        UserError, match="NaN or infinite"
    ):  # detected after the directory was created
        run.main(arguments)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="NaN or infinite"):
        run.main(arguments)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    record = RunDir(tmp_path / "run")
    with held(record.path / ".lock"):  # another process trains the run
        (tmp_path / "run" / "notes.txt").unlink()
        run.clear_launch(record)
    assert record.manifest.exists()
    run.clear_launch(record)
    assert not record.path.exists()


@pytest.mark.slow
def test_a_moved_run_resumes(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = quickstart([*TINY, "trainer.num_threads=1"])
    recipe.sweep = None
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(
        recipes.to_yaml(recipe), manifest.build(recipe, kind="run", name="run", source="quickstart")
    )
    done = _run(
        "--resume",
        str(run_dir.path),
        "trainer.micro_train_batch_size_per_gpu=1",
        "trainer.logger=tensorboard",
    )
    assert done.returncode == 0, done.stderr
    assert run_dir.status is Status.COMPLETE
    assert list((run_dir.path / "tensorboard").iterdir())
    assert "step 1/1" not in done.stdout  # the console was not among the loggers
