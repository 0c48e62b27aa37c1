"""Run the example command line of SkyRL's LoRA guide with `harness.run recipes/gsm8k_lora.yaml`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.paths import PROJECT
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status

NUM_GPUS = 4


def guide(home: Path) -> dict[str, str]:
    """Return the guide's overrides in order, as the shell passes them."""
    return {
        "data.train_data": f"['{home}/data/gsm8k/train.parquet']",
        "data.val_data": f"['{home}/data/gsm8k/validation.parquet']",
        "trainer.algorithm.advantage_estimator": "grpo",
        "trainer.policy.model.path": "Qwen/Qwen2.5-0.5B-Instruct",
        "trainer.policy.model.lora.rank": "32",
        "trainer.policy.model.lora.alpha": "32",
        "trainer.policy.model.lora.lora_sync_path": f"{home}/skyrl_lora_sync",
        "trainer.strategy": "fsdp2",
        "trainer.placement.colocate_all": "true",
        "trainer.placement.policy_num_gpus_per_node": str(NUM_GPUS),
        "trainer.placement.ref_num_gpus_per_node": str(NUM_GPUS),
        "generator.num_inference_engines": str(NUM_GPUS),
        "generator.inference_engine_tensor_parallel_size": "1",
        "trainer.epochs": "20",
        "trainer.eval_batch_size": "1024",
        "trainer.eval_before_train": "false",
        "trainer.eval_interval": "5",
        "trainer.update_epochs_per_batch": "1",
        "trainer.train_batch_size": "1024",
        "trainer.policy_mini_batch_size": "256",
        "trainer.micro_forward_batch_size_per_gpu": "64",
        "trainer.micro_train_batch_size_per_gpu": "64",
        "trainer.ckpt_interval": "10",
        "trainer.max_prompt_length": "512",
        "generator.sampling_params.max_generate_length": "1024",
        "trainer.policy.optimizer_config.lr": "3.0e-5",
        "trainer.algorithm.use_kl_loss": "true",
        "generator.backend": "vllm",
        "generator.run_engines_locally": "true",
        "generator.weight_sync_backend": "nccl",
        "generator.async_engine": "true",
        "generator.batched": "true",
        "environment.env_class": "gsm8k",
        "generator.n_samples_per_prompt": "5",
        "generator.gpu_memory_utilization": "0.8",
        "trainer.logger": "wandb",
        "trainer.project_name": "gsm8k_0.5b_lora",
        "trainer.run_name": "gsm8k_0.5b_lora_test",
        "trainer.resume_mode": "null",
        "trainer.ckpt_path": f"{home}/ckpts/gsm8k_0.5b_lora_ckpt",
    }


def harness_run(overrides: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness.run", "recipes/gsm8k_lora.yaml", *flags]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB_")
    }
    return subprocess.run(
        command + [f"{key}={value}" for key, value in overrides.items()],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


def test_the_guides_command_line_dry_runs_unchanged(tmp_path: Path) -> None:
    done = harness_run(guide(tmp_path), "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    for expected in (
        "Qwen/Qwen2.5-0.5B-Instruct",
        "LoRA rank 32, alpha 32, all-linear, lr 3e-05",
        "grpo, regular loss",
        "1024 prompts x 5 samples, 256 prompts an update",
        "processes  4 on auto; vllm",
        "log        wandb",
        f"{tmp_path}/data/gsm8k/train.parquet",
        "generator.weight_sync_backend has no effect",
    ):
        assert expected in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_memory_is_unknown_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = harness_run(guide(tmp_path), "--dry-run")
    assert done.returncode == 0
    assert "memory: not known: name each GPU's with --gpu-memory 80" in done.stdout


def test_the_guide_fits_four_gpus_of_80_gib(tmp_path: Path) -> None:
    done = harness_run(guide(tmp_path), "--dry-run", "--gpu-memory", "80")
    assert (done.returncode, done.stderr) == (0, "")
    assert "memory of a run, GiB on each of 4 GPUs" in done.stdout
    (total,) = (line for line in done.stdout.splitlines() if "in all, of 80.00" in line)
    sampling, training = map(float, total.split()[-2:])
    assert 15 < sampling < 40
    assert 5 < training < 40


def test_advice_names_settings_that_fit_one_gpu_of_24_gib(tmp_path: Path) -> None:
    small = ("--dry-run", "--gpu-memory", "1x24")
    done = harness_run(guide(tmp_path), *small)
    assert done.returncode == 2
    assert "4 GPUs asked, 1 there" in done.stderr
    (fix,) = (
        line.partition("fix:")[2].split() for line in done.stderr.splitlines() if "fix:" in line
    )
    changes = dict(one.split("=") for one in fix)
    assert changes["trainer.placement.policy_num_gpus_per_node"] == "1"
    again = harness_run(guide(tmp_path) | changes, *small)
    assert (again.returncode, again.stderr) == (0, "")
    assert "memory of a run, GiB on the GPU" in again.stdout


def test_missing_gpus_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = harness_run(guide(tmp_path) | {"ray.address": "null"})
    assert done.returncode == 2
    assert "not enough GPUs" in done.stderr
    assert "4 asked" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_guide_trains_a_tiny_model_on_two_cpu_ranks(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    data = tiny_model_dir / "data"
    small = {
        "trainer.policy.model.path": str(tiny_model_dir),
        "data.train_data": f"['{data}/train.parquet']",
        "data.val_data": f"['{data}/validation.parquet']",
        "environment.env_class": "tiny_gsm",
        "trainer.placement.device": "cpu",
        "trainer.placement.policy_num_gpus_per_node": "2",
        "trainer.placement.ref_num_gpus_per_node": "2",
        "generator.num_inference_engines": "2",
        "trainer.train_batch_size": "16",
        "trainer.policy_mini_batch_size": "8",
        "trainer.max_prompt_length": "128",
        "generator.sampling_params.max_generate_length": "64",
        "generator.eval_sampling_params.max_generate_length": "64",
        "trainer.max_steps": "2",
        "trainer.num_threads": "1",
    }
    done = harness_run(guide(tmp_path) | small)
    assert done.returncode == 0, done.stderr[-2000:]
    run_dir = RunDir(tmp_path / "ckpts" / "gsm8k_0.5b_lora_ckpt" / "gsm8k_0.5b_lora_test")
    assert run_dir.status is Status.COMPLETE
    rows = MetricsFile(run_dir.metrics).rows()
    assert [row["step"] for row in rows] == [1, 2]
    assert all(
        row["grad_norm"] > 0 and row["sampling/sampling_logp_difference/mean"] < 1e-3
        for row in rows
    )
    assert 0 <= rows[-1]["eval/accuracy"] <= 1
    assert (run_dir.adapter / "final" / "adapter_model.safetensors").is_file()
    assert list(run_dir.path.glob("wandb/offline-run-*/*.wandb"))
    # Adapter versions were written to the guide's folder, and were removed with the run.
    assert list((tmp_path / "skyrl_lora_sync").iterdir()) == []
