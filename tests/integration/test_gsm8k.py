"""Run the GSM8K recipe end to end at a small size.

The texts are real, and a small model is made from them.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.core.paths import PROJECT
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from tests.integration.gsm8k_model import make_gsm8k_model

LONGEST_PROMPT = 160
HELD_OUT = 96


@dataclass(frozen=True)
class Prepared:
    """Data files that `harness.prepare` writes, with fewer held-out problems, and the model."""

    train: Path
    validation: Path
    model: Path


def _command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prepared(gsm8k_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Prepare the real problems, and a model that writes answers in their format."""
    root = tmp_path_factory.mktemp("gsm8k")
    source = [str(gsm8k_dir / f"{name}.jsonl") for name in ("train", "test")]
    output = _command("harness.prepare", "gsm8k", "--source", *source, "--output-dir", str(root))
    assert "train.parquet: 7,473 problems" in output
    held_out = root / "held_out.parquet"
    pd.read_parquet(root / "validation.parquet").head(HELD_OUT).to_parquet(held_out)
    make_gsm8k_model(root / "model", gsm8k_dir)
    return Prepared(root / "train.parquet", held_out, root / "model")


@pytest.mark.slow
def test_the_model_is_an_ordinary_qwen2(prepared: Prepared) -> None:
    tokenizer = AutoTokenizer.from_pretrained(prepared.model)
    text = "Ann’s 1,080 clips cost $3.50 each — how much?\n#### 3780"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "How many?"}]
    shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    # The markup's tokens are single ones, and each digit is a token.
    assert [tokenizer.decode(i) for i in tokenizer(shown)["input_ids"]][:1] == ["<|im_start|>"]
    assert len(tokenizer("1234")["input_ids"]) == 4
    model = AutoModelForCausalLM.from_pretrained(prepared.model)
    assert model.config.model_type == "qwen2"
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.num_parameters() < 1_000_000


@pytest.fixture(scope="module")
def trained(
    prepared: Prepared, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], RunDir]:
    """Return a function that runs the recipe on a number of ranks, once each."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(ranks: int) -> RunDir:
        output = _command(
            "harness.run",
            "recipes/gsm8k_lora.yaml",
            f"data.train_data=[{prepared.train}]",
            f"data.val_data=[{prepared.validation}]",
            f"trainer.policy.model.path={prepared.model}",
            "trainer.policy.optimizer_config.lr=1e-3",
            "trainer.placement.device=cpu",
            f"trainer.placement.policy_num_gpus_per_node={ranks}",
            f"trainer.placement.ref_num_gpus_per_node={ranks}",
            f"generator.num_inference_engines={ranks}",
            "trainer.num_threads=1",
            "trainer.train_batch_size=16",
            "trainer.policy_mini_batch_size=16",
            "trainer.micro_train_batch_size_per_gpu=32",
            "trainer.max_steps=2",
            "trainer.eval_interval=2",
            "generator.n_samples_per_prompt=24",
            "generator.max_num_seqs=128",
            f"generator.max_input_length={LONGEST_PROMPT}",
            "generator.sampling_params.max_generate_length=64",
            "generator.eval_sampling_params.max_generate_length=64",
            "generator.eval_sampling_params.temperature=1.0",
            f"trainer.ckpt_path={root}",
            f"trainer.run_name=ranks{ranks}",
        )
        assert "after 2 steps" in output.splitlines()[-1]
        return RunDir(root / f"ranks{ranks}")

    return run


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_recipe_trains_on_the_real_texts(
    prepared: Prepared, trained: Callable[[int], RunDir], ranks: int
) -> None:
    run = trained(ranks)
    assert run.read_manifest()["status"] == "COMPLETE"
    base, *steps = MetricsFile(run.metrics).rows()
    assert [row["step"] for row in (base, *steps)] == [0, 1, 2]
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-3 for row in steps)
    # Completions end, and some are right by luck, so there is a signal to learn from.
    assert all(row["completions/clipped_ratio"] < 0.5 for row in steps)
    assert max(row["reward"] for row in steps) > 0
    assert max(row["grad_norm"] for row in steps) > 0
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[0]["num_dropped_prompts"] == _prompts_above(prepared, LONGEST_PROMPT) > 0
    learned = load_file(run.adapter / "final" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in learned.items() if "lora_B" in name)
    samples = pd.read_parquet(run.eval_samples(2))
    questions = {info["question"] for info in pd.read_parquet(prepared.validation)["extra_info"]}
    assert set(samples["question"]) <= questions
    assert samples["completion"].str.contains("####").any()


@pytest.mark.slow
def test_two_ranks_train_like_one(trained: Callable[[int], RunDir]) -> None:
    one, two = (MetricsFile(trained(ranks).metrics).rows()[1:] for ranks in (1, 2))
    for name in ("reward", "loss", "kl", "entropy", "grad_norm", "num_tokens"):
        assert [row[name] for row in two] == pytest.approx(
            [row[name] for row in one], rel=1e-5, abs=1e-5
        ), name


def _prompts_above(prepared: Prepared, limit: int) -> int:
    tokenizer = AutoTokenizer.from_pretrained(prepared.model)
    prompts = [list(prompt) for prompt in pd.read_parquet(prepared.train)["prompt"]]
    texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    return sum(len(ids) > limit for ids in tokenizer(texts)["input_ids"])
