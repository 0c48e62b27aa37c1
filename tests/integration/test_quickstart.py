"""Run the quickstart's single run with vLLM.

The run must learn and be reproducible, and its adapter must work in other programs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.metrics import without_timings
from harness.core.paths import PROJECT
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from rltrain.data.files import Example, load_examples
from rltrain.envs.gsm8k import reward

GAP = "sampling/sampling_logp_difference/mean"
MAX_TOKENS = 64


def _run(folder: Path, name: str, *overrides: str) -> tuple[RunDir, str]:
    command = [
        sys.executable,
        "-m",
        "harness.run",
        "recipes/quickstart.yaml",
        f"trainer.ckpt_path={folder}",
        f"trainer.run_name={name}",
        *overrides,
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return RunDir(folder / name), done.stdout


@pytest.fixture(scope="module")
def quickstart(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, str]:
    """Train the quickstart's run, at three quarters of its length."""
    short = ["trainer.max_steps=24", "trainer.eval_interval=24", "--check"]
    return _run(tmp_path_factory.mktemp("quickstart"), "run", *short)


@pytest.fixture(scope="module")
def held_out(tiny_model_dir: Path) -> list[Example]:
    return load_examples([str(tiny_model_dir / "data" / "validation.parquet")])


def test_the_quickstart_learns(quickstart: tuple[RunDir, str]) -> None:
    run, output = quickstart
    result = run.read_manifest()["result"]
    assert result["base"]["eval/accuracy"] <= 0.40
    assert result["metrics"]["eval/accuracy"] >= 0.80
    last = output.strip().splitlines()[-1]
    assert f"held-out accuracy {result['metrics']['eval/accuracy']:.3f}" in last
    assert last.endswith(str(run.path))
    assert "ETA" in output
    assert [verdict["met"] for verdict in run.read_manifest()["expect"]] == [True, True]
    assert "met: eval/accuracy" in output


def test_engine_and_trainer_agree_throughout(quickstart: tuple[RunDir, str]) -> None:
    gaps = [row[GAP] for row in MetricsFile(quickstart[0].metrics).rows() if GAP in row]
    assert len(gaps) == 24
    assert max(gaps) < 1e-3


@pytest.mark.slow
def test_the_adapter_scores_the_same_in_plain_peft(
    quickstart: tuple[RunDir, str], tiny_model_dir: Path, held_out: list[Example]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = quickstart[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(base, run.adapter / "final").eval()
    texts = [
        tokenizer.apply_chat_template(e.prompt, tokenize=False, add_generation_prompt=True)
        for e in held_out
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    with torch.no_grad():
        tokens = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=MAX_TOKENS
        )
    completions = tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert _accuracy(completions, held_out) == pytest.approx(_final(run), abs=0.04)


@pytest.mark.slow
def test_the_adapter_scores_the_same_in_plain_vllm(
    quickstart: tuple[RunDir, str], tiny_model_dir: Path, held_out: list[Example], tmp_path: Path
) -> None:
    run = quickstart[0]
    (tmp_path / "prompts.json").write_text(json.dumps([example.prompt for example in held_out]))
    # A separate process: none of our code has touched this vLLM.
    code = f"""
import json, os
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
llm = LLM({str(tiny_model_dir)!r}, dtype="float32", enable_lora=True, max_lora_rank=8, enforce_eager=True,
          max_model_len=192)
prompts = json.load(open({str(tmp_path / "prompts.json")!r}))
outputs = llm.chat(prompts, SamplingParams(temperature=1.0, max_tokens={MAX_TOKENS}),
                   lora_request=LoRARequest("final", 1, {str(run.adapter / "final")!r}), use_tqdm=False)
json.dump([o.outputs[0].text for o in outputs], open({str(tmp_path / "texts.json")!r}, "w"))
"""  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    completions = json.loads((tmp_path / "texts.json").read_text())
    assert _accuracy(completions, held_out) == pytest.approx(_final(run), abs=0.04)


@pytest.mark.slow
def test_two_processes_give_the_same_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    short = ["trainer.max_steps=2", "trainer.eval_before_train=false"]
    one, two = (_run(tmp_path, name, *short)[0] for name in ("one", "two"))
    rows: list[Any] = [
        [without_timings(row) for row in MetricsFile(run.metrics).rows()] for run in (one, two)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    files = [
        (run.adapter / "final" / "adapter_model.safetensors").read_bytes() for run in (one, two)
    ]
    assert files[0] == files[1]


def _final(run: RunDir) -> float:
    return float(run.read_manifest()["result"]["metrics"]["eval/accuracy"])


def _accuracy(completions: list[str], examples: list[Example]) -> float:
    scores = [
        reward(text, example.ground_truth)
        for text, example in zip(completions, examples, strict=True)
    ]
    return sum(scores) / len(scores)
