"""Train the tiny_gsm base model from scratch on a CPU, on a mixture of good and bad answers."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.records.files import write_json
from rltrain.envs import gsm8k, tiny_gsm
from rltrain.envs.tiny_gsm_tokenizer import MAX_LENGTH, build_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

TokenPair = tuple[list[int], list[int]]  # prompt, completion

MAX_NEW_TOKENS = 64
_MICRO_BATCH = 32  # sequences of similar length in one pass, with little padding


@dataclass(frozen=True)
class Pretraining:
    """Settings: optimizer steps, sequences a step, peak learning rate, seed, CPU threads."""

    steps: int = 1500
    batch_size: int = 128
    lr: float = 3e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    seed: int = 0
    threads: int = 2
    eval_problems: int = 1024


def prepare(
    output_dir: Path, settings: Pretraining, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Write data, tokenizer, trained model and `card.json` to `output_dir`; return the card.

    The same settings on the same machine give the same weights.
    """
    import torch

    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = tiny_gsm.prepare(None, output_dir / "data")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    say(
        f"tiny_gsm: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, "
        f"{settings.steps} steps"
    )
    started = time.monotonic()
    loss = train(model, tokenizer, settings, say)
    minutes = (time.monotonic() - started) / 60
    held_out = list(
        itertools.islice(tiny_gsm.problems("test", settings.seed), settings.eval_problems)
    )
    card = {
        "task": "tiny_gsm: templated grade-school word problems, scored by the gsm8k environment",
        "parameters": model.num_parameters(),
        "pretraining": asdict(settings),
        "habits": tiny_gsm.HABITS,
        "rows": rows,
        "final_loss": round(loss, 4),
        "minutes": round(minutes, 1),
        "held_out": measure(model, tokenizer, held_out, settings.seed),
    }
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    write_json(output_dir / "card.json", card)
    return card


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Return a new Qwen2 model of about 0.75 M parameters in float32, with tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config).to(torch.float32)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 1.0
    return model


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    settings: Pretraining,
    say: Callable[[str], None],
) -> float:
    """Train on the completions; return the mean loss (nats per token) of the last 50 steps."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warmup_cosine(step, settings)
    )
    model.train()
    started, losses = time.monotonic(), []
    batches = _batches(tokenizer, settings)
    for step, batch in enumerate(itertools.islice(batches, settings.steps), start=1):
        losses.append(_backward(model, batch))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == settings.steps:
            left = (time.monotonic() - started) / step * (settings.steps - step)
            say(f"step {step}/{settings.steps}  loss {losses[-1]:.4f}  ETA {left / 60:.1f} min")
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def measure(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[tiny_gsm.WordProblem],
    seed: int,
) -> dict[str, float]:
    """Sample one completion a problem at temperature 1 and return accuracies.

    A completion is well formed if reasoning precedes `####`. `accuracy_when_well_formed` is what
    reinforcement learning can reach by shifting habits alone.
    """
    import torch

    torch.manual_seed(seed)
    completions = sample(model, tokenizer, [gsm8k.prompt(problem.question) for problem in held_out])
    rewards = [gsm8k.reward(c, str(p.answer)) for c, p in zip(completions, held_out, strict=True)]
    formed = [r for r, c in zip(rewards, completions, strict=True) if c.find(gsm8k.MARKER) > 0]
    return {
        "problems": len(held_out),
        "accuracy": round(sum(rewards) / len(rewards), 4),
        "accuracy_when_well_formed": round(sum(formed) / max(1, len(formed)), 4),
        "share_well_formed": round(len(formed) / len(rewards), 4),
    }


def sample(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
) -> list[str]:
    """Return one completion a prompt at temperature 1, of at most MAX_NEW_TOKENS tokens."""
    import torch

    texts = [_chat_text(tokenizer, messages) for messages in prompts]
    completions: list[str] = []
    for start in range(0, len(texts), 256):
        encoded = tokenizer(
            texts[start : start + 256], return_tensors="pt", padding=True, padding_side="left"
        )
        with torch.no_grad():
            tokens = model.generate(
                **encoded,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        new_tokens = tokens[:, encoded["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return completions


def _batches(
    tokenizer: PreTrainedTokenizerBase, settings: Pretraining
) -> Iterator[list[TokenPair]]:
    """Yield batches of (prompt tokens, completion tokens) of the train split, sorted by length."""
    problems = tiny_gsm.problems("train", settings.seed)
    # A separate stream: habits must not depend on the problem.
    rng = random.Random(f"tiny_gsm/habits/{settings.seed}")
    names, weights = list(tiny_gsm.HABITS), list(tiny_gsm.HABITS.values())
    while True:
        prompts, completions = [], []
        for problem in itertools.islice(problems, settings.batch_size):
            prompts.append(_chat_text(tokenizer, gsm8k.prompt(problem.question)))
            habit = rng.choices(names, weights)[0]
            completions.append(
                tiny_gsm.answer_with_habit(problem, habit, rng) + tokenizer.eos_token
            )
        pairs = zip(
            tokenizer(prompts)["input_ids"], tokenizer(completions)["input_ids"], strict=True
        )
        yield sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))


def _backward(model: Qwen2ForCausalLM, batch: list[TokenPair]) -> float:
    """Accumulate gradients of the mean cross-entropy over completion tokens; return the loss."""
    import torch

    total = sum(len(completion) for _, completion in batch)
    batch_loss = 0.0
    for start in range(0, len(batch), _MICRO_BATCH):
        tokens, is_completion = _right_pad(batch[start : start + _MICRO_BATCH])
        # Right padding under a causal mask needs no attention mask.
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[is_completion[:, 1:]])
        targets = tokens[:, 1:][is_completion[:, 1:]]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / total
        loss.backward()
        batch_loss += loss.item()
    return batch_loss


def _right_pad(pairs: Sequence[TokenPair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens `[B, T]`, and which of them belong to completions `[B, T]`."""
    import torch

    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    tokens = torch.zeros((len(pairs), longest), dtype=torch.long)
    is_completion = torch.zeros((len(pairs), longest), dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        tokens[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        is_completion[row, len(prompt) : len(prompt) + len(completion)] = True
    return tokens, is_completion


def _chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _warmup_cosine(step: int, settings: Pretraining) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
