"""`python -m harness.run` with bad input: one message, exit status 2, no traceback, nothing heavy
imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import run
from harness.config import recipe as recipes
from harness.core.errors import UserError
from harness.core.locks import held
from harness.core.paths import PROJECT
from harness.records import manifest
from harness.records.run_dir import RunDir
from tests.recipes import quickstart


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # An import of torch would be seen: -X importtime names every module on stderr.
    command = [sys.executable, "-X", "importtime", "-m", "harness.run", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["recipes/quickstart.yaml", "trainer.policy.model.lora.rnak=3"],
            "did you mean trainer.policy.model.lora.rank?",
        ),
        (
            [
                "recipes/gsm8k_lora.yaml",
                "trainer.placement.policy_num_gpus_per_node=4",
                "generator.num_inference_engines=4",
            ],
            "4 asked",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_input_exits_2(arguments: list[str], told: str) -> None:
    done = _run(*arguments)
    message = "\n".join(
        line for line in done.stderr.splitlines() if not line.startswith("import time:")
    )
    assert done.returncode == 2
    assert told in message
    assert "Traceback" not in message
    imported = {
        line.rsplit("|", 1)[-1].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert not imported & {"torch", "vllm", "ray", "transformers", "peft"}


def test_advice_and_settings_without_effect_are_told(tiny_model_dir: Path) -> None:
    done = _run(
        "recipes/quickstart.yaml",
        "--dry-run",
        "trainer.target_modules=attention",
        "generator.async_engine=true",
    )
    assert done.returncode == 0
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert any("generator.async_engine has no effect here" in note for note in notes)
    assert any("attention" in note and "LoRA Without Regret" in note for note in notes)


def test_a_run_goes_on_with_the_data_it_began_with(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.parquet"
    shutil.copy(tiny_model_dir / "data" / "train.parquet", data)
    recipe = quickstart(
        [f"data.train_data=[{data}]", f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"]
    )
    recipe.sweep = None
    run_dir = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match="a new run has none"):
        run.main(
            [
                "quickstart",
                f"trainer.ckpt_path={tmp_path}",
                "trainer.run_name=other",
                "--changed-inputs",
            ]
        )
    run_dir.create(
        recipes.to_yaml(recipe), manifest.build(recipe, kind="run", name="run", source="quickstart")
    )
    shutil.copy(tiny_model_dir / "data" / "validation.parquet", data)
    before = run_dir.manifest.read_bytes()
    with pytest.raises(
        UserError,
        match=r"the inputs of this run have changed since it began\n"
        r".*data .*train.parquet(.|\n)*--changed-inputs",
    ):
        run.main(["--resume", str(run_dir.path)])
    assert run_dir.manifest.read_bytes() == before
    assert not (tmp_path / "other").exists()


def test_nothing_is_made_in_a_directory_that_another_start_has(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    with (
        held(tmp_path / "run" / ".lock"),
        pytest.raises(UserError, match="another process is training this run"),
    ):
        run.main(
            ["recipes/quickstart.yaml", f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"]
        )
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]
