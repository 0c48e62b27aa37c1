"""Test the embedded model: small files, a reversible tokenizer, and room to learn."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness import prepare as command
from rltrain.data.files import load_examples, read_rows
from rltrain.envs import tiny_gsm
from rltrain.envs.tiny_gsm_pretrain import MAX_NEW_TOKENS, Pretraining, measure, prepare
from rltrain.envs.tiny_gsm_tokenizer import END, PAD, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_files_are_small_and_complete(tiny_model_dir: Path) -> None:
    files = {
        path.relative_to(tiny_model_dir).as_posix()
        for path in tiny_model_dir.rglob("*")
        if path.is_file()
    }
    assert files == {
        "card.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "data/train.parquet",
        "data/validation.parquet",
        "data/test.parquet",
    }
    assert sum((tiny_model_dir / name).stat().st_size for name in files) <= 4 * 2**20


def test_tokenizer_round_trip(tiny_model_dir: Path, tokenizer: Any) -> None:
    for split in tiny_gsm.SPLIT_SIZES:
        for row in read_rows(tiny_model_dir / "data" / f"{split}.parquet"):
            chat = tokenizer.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            )
            prompt, answer = tokenizer.encode(chat), tokenizer.encode(row["extra_info"]["answer"])
            assert tokenizer.decode(prompt) == chat
            assert tokenizer.decode(answer) == row["extra_info"]["answer"]
            assert tokenizer.encode(chat + row["extra_info"]["answer"]) == prompt + answer
            assert len(prompt) <= 80
            assert len(answer) < MAX_NEW_TOKENS
    assert tokenizer.decode(tokenizer.encode("Anything else, too: 3½ <b>größer</b>\n")) == (
        "Anything else, too: 3½ <b>größer</b>\n"
    )


def test_words_and_digits_are_single_tokens(tiny_model_dir: Path, tokenizer: Any) -> None:
    with_digits = {token for token in tokenizer.get_vocab() if re.search(r"\d", token)}
    assert with_digits == set("0123456789")
    # Without numbers and punctuation there are as many tokens as words.
    for problem in itertools.islice(tiny_gsm.problems("test", seed=1), 500):
        for phrase in re.findall(r"(?: [A-Za-z]+)+", problem.question):
            assert len(tokenizer.encode(phrase)) == len(phrase.split())


def test_the_tokenizer_is_the_one_the_command_builds(tokenizer: Any) -> None:
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == (END, PAD)


def test_the_base_leaves_room_for_reinforcement_learning(
    tiny_model_dir: Path, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    held_out = list(itertools.islice(tiny_gsm.problems("test", seed=7), 512))
    measured = measure(model, tokenizer, held_out, seed=7)
    assert 0.20 <= measured["accuracy"] <= 0.40
    assert measured["accuracy_when_well_formed"] >= 0.90
    card = json.loads((tiny_model_dir / "card.json").read_text())
    assert card["held_out"]["accuracy"] == pytest.approx(measured["accuracy"], abs=0.08)
    assert card["parameters"] == model.num_parameters()


@pytest.mark.slow
def test_a_short_training_writes_a_model_that_loads_and_is_reproducible(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = Pretraining(steps=3, batch_size=8, threads=1, eval_problems=8)
    messages: list[str] = []
    for name in ("one", "two"):
        card = prepare(tmp_path / name, settings, messages.append)
    assert any("ETA" in line for line in messages)
    assert card["pretraining"]["steps"] == 3
    assert card["held_out"]["problems"] == 8
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "one"))


def test_tiny_gsm_in_three_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    arguments = ["--steps", "3", "--seed", "1", "--threads", "1", "--eval-problems", "16"]
    assert command.main(["tiny_gsm", "--output-dir", str(tmp_path), *arguments]) == 0
    assert "held-out accuracy, sampled at temperature 1" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() < 1_500_000
    assert len(load_examples([tmp_path / "data" / "test.parquet"])) == 1024
