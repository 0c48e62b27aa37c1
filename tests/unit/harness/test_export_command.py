"""The export command with bad input: one message, exit status 2, nothing heavy imported, nothing
written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.core.paths import PROJECT
from harness.export import main
from harness.records.files import seal
from harness.records.run_dir import RunDir, Status
from tests.unit.analysis.synthetic import (
    RANK,
    Sweep,
    Trial,
    example,
    params,
    write_run,
    write_sweep,
)

HEAVY = {"torch", "vllm", "ray", "transformers", "peft"}


def _run(root: Path, status: Status = Status.COMPLETE, *, best: bool = False) -> Path:
    """A run's directory as one leaves it, its weights aside."""
    path = write_run(root, Trial(0, 0, params(8, 1e-3), 0.9, status=status))
    for which in ["best"] * best + ["final"] * (status is Status.COMPLETE):
        folder = RunDir(path).adapter / which
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"]}))
        seal(folder)
    return path


def _error(*arguments: object) -> UserError:
    with pytest.raises(UserError) as caught:
        main([str(argument) for argument in arguments])
    return caught.value


@pytest.mark.parametrize("status", [Status.RUNNING, Status.FAILED, Status.PRUNED])
@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_is_not_complete_says_what_it_has(
    tmp_path: Path, status: Status, best: bool
) -> None:
    path = _run(tmp_path, status, best=best)
    error = _error(path, "--output", tmp_path / "out")
    assert error.what == f"the run is {status.value}: it has no final policy"
    if best:
        assert "--which best" in str(error.fix)
    elif status is Status.PRUNED:
        assert error.fix is None
    else:
        assert str(error.fix).endswith(f"harness.run --resume {path}")
    if not best:
        assert (
            "no best policy" in _error(path, "--which", "best", "--output", tmp_path / "out").what
        )


def test_a_complete_run_whose_policy_is_gone_says_so(tmp_path: Path) -> None:
    path = _run(tmp_path)
    shutil.rmtree(path / "adapter" / "final")
    error = _error(path, "--output", tmp_path / "out")
    assert error.what == "the run has no final policy"
    assert "adapter/final" in str(error.got)


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    path = _run(tmp_path)
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    assert "exists already" in _error(path, "--output", output).what
    assert "exists already" in _error(path, "--output", output / "mine.txt").what
    assert (output / "mine.txt").read_text() == "keep"


def test_a_sweep_names_its_winners_trial(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, example())
    error = _error(path, "--output", tmp_path / "out")
    assert error.what.startswith("a sweep holds a policy for each trial")
    assert str(error.fix) == f"the winning configuration's best trial is {path / 'trials' / '0004'}"


def test_a_sweep_without_a_winner_names_none(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, Sweep([Trial(0, 0, {RANK: 8}, 0.3, status=Status.RUNNING)]))
    assert _error(path, "--output", tmp_path / "out").fix is None


def test_a_base_model_that_is_not_on_the_hub_either_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    path = _run(tmp_path / "runs")
    (path / "adapter" / "final" / "adapter_model.safetensors").write_bytes(b"")
    for options in ([], ["--merged"]):
        error = _error(path, "--output", tmp_path / "out", *options)
        assert error.what == "cannot load the base model"
        assert str(error.got).startswith("tiny-model")
    assert sorted(os.listdir(tmp_path)) == ["runs"]


def test_an_output_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    path = _run(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert (
        "cannot write the output folder" in _error(path, "--output", tmp_path / "file" / "out").what
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--output", "out"], "not a run directory"),
        (["run"], "--output"),
        (["run", "--which", "last", "--output", "out"], "invalid choice: 'last'"),
        (["run", "--output", "out"], "the run is RUNNING"),
    ],
)
def test_bad_input_exits_2(tmp_path: Path, arguments: list[str], told: str) -> None:
    _run(tmp_path, Status.RUNNING).rename(tmp_path / "run")
    # An import of torch would be seen: -X importtime names every module on stderr.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "harness.export", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    message = "\n".join(line for line in lines if not line.startswith("import time:"))
    assert done.returncode == 2
    assert told in message
    assert "Traceback" not in message
    assert (
        not {line.rsplit("|", 1)[-1].strip() for line in lines if line.startswith("import time:")}
        & HEAVY
    )
    assert not (tmp_path / "out").exists()
