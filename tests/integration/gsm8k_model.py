"""Build a small model from GSM8K's texts.

It has a byte-level BPE tokenizer, a ChatML template and a short supervised warm-up.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from rltrain.envs import gsm8k
from rltrain.envs.tiny_gsm_tokenizer import CHAT_TEMPLATE, END, PAD, START

VOCABULARY = 2048
MAX_LENGTH = 1024
BATCH_SIZE = 32
LEARNING_RATE = 3e-3

Pair = tuple[list[int], list[int]]  # token ids of prompt and completion


def make_gsm8k_model(folder: Path, source: Path, *, seed: int = 0, steps: int = 140) -> None:
    """Write a tokenizer and model, made from the train.jsonl in `source`, to `folder`.

    The supervised steps teach the model to end with a step of reasoning and `#### N`. The numbers
    are seldom right.
    """
    rows = [json.loads(line) for line in (source / "train.jsonl").open(encoding="utf-8")]
    tokenizer = _tokenizer([f"{row['question']}\n{row['answer']}" for row in rows])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(tokenizer)
        _train(model, _batches(_pairs(tokenizer, rows), random.Random(seed)), steps)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the class that `AutoTokenizer` builds for a Qwen2 model."""
    blank = Qwen2Tokenizer(
        pad_token=PAD, eos_token=END, unk_token=None, additional_special_tokens=[START]
    )
    tokenizer = blank.train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = MAX_LENGTH
    return tokenizer


def _model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def _pairs(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> list[Pair]:
    """Return chat prompts in the environment's wording and the end of each solution.

    Calculator annotations are removed.
    """
    prompts = [
        tokenizer.apply_chat_template(
            gsm8k.prompt(row["question"]), tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    solutions = (re.sub(r"<<.*?>>", "", row["answer"]).splitlines() for row in rows)
    completions = ["\n".join(lines[-2:]) + END for lines in solutions]
    pairs = zip(tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"], strict=True)
    # Short solutions teach the format as well, in a third of the time.
    return sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))[: len(rows) // 3]


def _batches(pairs: list[Pair], rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of tokens and labels `[B, T]` without end.

    Pairs of similar length share a batch, so that there is little padding.
    """
    while True:
        start = rng.randrange(len(pairs) - BATCH_SIZE)
        batch = pairs[start : start + BATCH_SIZE]
        longest = max(len(prompt) + len(completion) for prompt, completion in batch)
        tokens = torch.zeros((BATCH_SIZE, longest), dtype=torch.long)
        labels = torch.full_like(tokens, -100)
        for row, (prompt, completion) in enumerate(batch):
            whole = torch.tensor(prompt + completion)
            tokens[row, : len(whole)] = whole
            labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
        yield tokens, labels


def _train(
    model: Qwen2ForCausalLM, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _, (tokens, labels) in zip(range(steps), batches, strict=False):
        # Right padding under a causal mask needs no attention mask.
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
