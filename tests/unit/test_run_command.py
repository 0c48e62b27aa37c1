"""`python -m harness.run` with bad input: one message, exit status 2, no traceback, nothing heavy imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.paths import PROJECT


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
        (["recipes/quickstart.yaml", "trainer.policy.model.lora.rank=many"], "cannot take this value"),
        (["recipes/quickstart.yaml", "trainer.policy.optimizer_config.lr=-1"], "out of range"),
        (["recipes/quickstart.yaml", "data.train_data=[nowhere.parquet]"], "nowhere.parquet"),
        (["recipes/quikstart.yaml"], "did you mean recipes/quickstart.yaml?"),
        (["recipes/gsm8k_lora.yaml"], "4 asked"),
        ([], "no recipe was given"),
        (["recipes/quickstart.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["--resume", "recipes"], "not a run directory"),
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
    tiny = ["generator.backend=transformers", "trainer.max_steps=1", "trainer.train_batch_size=2",
            "trainer.policy_mini_batch_size=2", "generator.n_samples_per_prompt=2", "trainer.eval_before_train=false",
            "generator.eval_sampling_params.max_generate_length=2"]  # fmt: skip
    first = _run(*arguments, *tiny)
    assert first.returncode == 0, first.stderr
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = _run(*arguments, *tiny)
    assert again.returncode == 2
    assert "COMPLETE already" in again.stderr
    other = _run("--resume", str(tmp_path / "run"))
    assert other.returncode == 2
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept
