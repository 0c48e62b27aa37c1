"""Test what `harness.check` and `harness.run --check` print, write and return."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness import check, run
from harness.config import recipe as recipes
from harness.core.errors import UserError
from harness.core.paths import PROJECT
from harness.records.run_dir import RunDir
from rltrain.member import Member
from rltrain.trainer import Trainer
from tests.integration.conftest import restore_interrupts
from tests.integration.logged import TensorBoardRun
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


def recipe_file(folder: Path, expect: str) -> str:
    """Write the recipe of a tiny run with the quickstart's values."""
    file = folder / "mine.yaml"
    values = recipes.to_dict(quickstart(TINY))
    values["expect"] |= yaml.safe_load(expect)
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(file)


def test_every_seed_is_trained_and_the_mean_is_judged(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two tokens are too few for an answer: the accuracy is 0 for every seed.
    file = recipe_file(
        tmp_path, "{eval/accuracy: {min: 0, max: 0.1}, completions/mean_length: {min: 1000}}"
    )
    arguments = [
        file,
        f"trainer.ckpt_path={tmp_path}",
        "trainer.run_name=checked",
        "--seeds",
        "3,4",
    ]
    assert check.main(arguments) == 3
    output = capsys.readouterr().out
    assert "met: eval/accuracy 0 (2 seeds, 95% 0 to 0), expected >= 0 and <= 0.1" in output
    assert "NOT MET: completions/mean_length" in output
    assert "2 of 3 expectations met over 2 seeds" in output
    record = json.loads((tmp_path / "checked" / "check.json").read_text())
    unmet = [[verdict["metric"] for verdict in record["verdicts"] if not verdict["met"]]]
    manifests = [RunDir(tmp_path / "checked" / f"seed{seed}").read_manifest() for seed in (3, 4)]
    assert [manifest["seed"] for manifest in manifests] == [3, 4]
    unmet += [
        [verdict["metric"] for verdict in manifest["expect"] if not verdict["met"]]
        for manifest in manifests
    ]
    assert unmet == [["completions/mean_length"]] * 3


def test_a_failed_seed_ends_the_check(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = recipe_file(tmp_path, "{eval/accuracy: {min: 0}}")
    arguments = [
        file,
        "trainer.policy.model.path=./nowhere",
        f"trainer.ckpt_path={tmp_path}",
        "trainer.run_name=failed",
    ]
    assert check.main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.err.count("trainer.policy.model.path names no folder") == 1
    assert "expectations met" not in captured.out


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_check_stops_its_run(
    tiny_model_dir: Path, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    file = recipe_file(tmp_path, "{eval/accuracy: {min: 0}}")
    batches = [
        "trainer.eval_batch_size=512",
        "trainer.micro_train_batch_size_per_gpu=8",
        "trainer.micro_forward_batch_size_per_gpu=8",
        "trainer.max_tokens_per_microbatch=null",
    ]
    start = [
        sys.executable,
        "-m",
        "harness.check",
        file,
        *batches,
        "trainer.max_steps=1000",
        "trainer.eval_interval=0",
        f"trainer.ckpt_path={tmp_path}",
        "trainer.run_name=stopped",
    ]
    process = subprocess.Popen(
        start,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts,
    )
    assert process.stdout is not None
    # Progress is printed while the run trains. The signal goes to the command alone, which passes
    # it on.
    assert any(line.startswith("step    3/1000") for line in process.stdout)
    process.send_signal(sent)
    # Returns when the run has closed its end of the pipe as well.
    out, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert ("stopped; resume with: python -m harness.run --resume" in errors) == (
        sent is signal.SIGINT
    )
    assert "expectations met" not in out
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["seed0"]


@pytest.mark.parametrize(("flags", "status"), [([], 0), (["--check"], 3)])
def test_a_run_prints_unmet_expectations(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    status: int,
) -> None:
    file = recipe_file(tmp_path, "{eval/accuracy: {min: 0.5}}")
    arguments = [file, f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run", *flags]
    assert run.main(arguments) == status
    assert RunDir(tmp_path / "run").read_manifest()["expect"][0]["met"] is False
    assert "NOT MET" in capsys.readouterr().out

    # The expectations hold neither for another experiment nor for a run that uses this recipe as
    # its base. Another seed is the same experiment.
    rate = "trainer.policy.optimizer_config.lr=1e-5"
    other = [file, rate, f"trainer.ckpt_path={tmp_path}", "trainer.run_name=other", *flags]
    assert run.main(other) == status
    taken = [
        "--from",
        str(tmp_path / "other"),
        "seed=5",
        f"trainer.ckpt_path={tmp_path}",
        "trainer.run_name=taken",
    ]
    assert run.main([*taken, *flags]) == status
    output = capsys.readouterr().out
    assert output.count(f"is not judged: it was overridden ({rate})") == (0 if flags else 2)
    assert output.count("NOT MET") == (2 if flags else 0)
    assert bool(RunDir(tmp_path / "taken").read_manifest()["expect"]) == bool(flags)


@pytest.mark.parametrize("flags", [["--check"], []])
def test_a_run_killed_before_its_verdict_is_judged_without_training_again(
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
) -> None:
    file = recipe_file(tmp_path, "{eval/accuracy: {min: 0.5}}")
    logger = "trainer.logger=[console,tensorboard]"
    start = [file, logger, f"trainer.ckpt_path={tmp_path}", "trainer.run_name=run"]

    finish = Trainer._finish

    def killed(self: Trainer, member: Member) -> None:
        finish(self, member)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run.main(start)
    run_dir = RunDir(tmp_path / "run")
    record = run_dir.read_manifest()
    assert record["status"] == "COMPLETE"
    assert "expect" not in record
    assert not (run_dir.path / "tensorboard").exists()
    trained = {
        path: path.read_bytes()
        for path in run_dir.path.rglob("*")
        if path.suffix in (".jsonl", ".safetensors")
    }
    capsys.readouterr()
    resume = ["--resume", str(run_dir.path), *flags] if flags else start
    assert run.main(resume) == (run.UNMET if flags else 0)
    output = capsys.readouterr().out
    assert "its verdict was not written" in output
    assert "NOT MET: eval/accuracy 0 (one seed), expected >= 0.5" in output
    assert "held-out accuracy 0.000 after 1 steps" in output
    assert {path: path.read_bytes() for path in trained} == trained
    now = run_dir.read_manifest()
    assert now["expect"][0]["met"] is False
    assert {**now, "expect": None} == {**record, "expect": None}
    assert [step for step, _ in TensorBoardRun(run_dir).scalars("reward")] == [1]
    with pytest.raises(UserError, match="COMPLETE already"):
        run.main(resume)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes/base.yaml", "trainer.policy.model.path=x"], "has no expectations"),
        (["recipes/quickstart.yaml", "--seeds", "0,zero"], "different numbers"),
        (["recipes/quickstart.yaml", "--seeds", "1,1"], "different numbers"),
        ([], "recipe"),
    ],
)
def test_bad_input_is_explained(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check.main(arguments)
    assert message in str(caught.value)
