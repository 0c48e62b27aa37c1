"""Make a tiny random Qwen2 with adapters, and compute log-probabilities as the trainer does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from harness.config.schema import Backend, Device, Recipe, Sampling
from rltrain.distributed.cluster import cluster
from rltrain.engines.base import ENGINES, Engine, EngineOptions, Request, Sample, build_engine
from rltrain.engines.remote import start_engines

Kind: TypeAlias = Backend | Literal["remote"]
KINDS: list[Kind] = [*ENGINES, "remote"]

VOCAB = 101
# Many ids end a completion, so that some random completions stop and some reach the limit.
STOP_TOKEN_IDS = (2, 17, 40, 41, 42, 77)
MAX_INPUT_LENGTH = 96
LONGEST = 24
ADAPTERS = {
    "all_linear": LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear"
    ),
    "attention": LoraConfig(
        task_type="CAUSAL_LM", r=1, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"]
    ),
}


def write_base(folder: Path) -> None:
    """Write a base model without tokenizer.

    It has packed projections of unequal width, biases and tied embeddings.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Sharper than the usual initialisation, so that samples are not uniform.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder)


def load_base(base_dir: Path) -> Qwen2ForCausalLM:
    """Load the base in float32."""
    return Qwen2ForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()


def adapt(base: Qwen2ForCausalLM, members: Iterable[str] = tuple(ADAPTERS)) -> PeftModel:
    """Return the base with the named adapters of ADAPTERS, B not zero."""
    first, *others = members
    torch.manual_seed(1)
    model = get_peft_model(base, ADAPTERS[first], adapter_name=first)
    for name in others:
        model.add_adapter(name, ADAPTERS[name])
    for name in (first, *others):
        shake(model, name, seed=2)
    return model.eval()


@torch.no_grad()
def shake(model: PeftModel, member: str, seed: int) -> None:
    """Change an adapter's B, like training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{member}" in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def start(
    kind: Kind,
    model: torch.nn.Module,
    base_dir: Path,
    *,
    max_lora_rank: int = 4,
    tensor_parallel_size: int = 1,
) -> Engine:
    """Start an engine for both adapters.

    With `max_lora_rank` 0 its weights are replaced instead. "remote" means two vLLM engines in
    separate actors, or one engine on `tensor_parallel_size` processes.
    """
    recipe = Recipe()
    recipe.trainer.placement.device = Device.cpu
    recipe.trainer.num_threads = 1 if kind == "remote" else None
    recipe.generator.backend = Backend.vllm if kind == "remote" else kind
    recipe.generator.max_input_length = MAX_INPUT_LENGTH
    recipe.generator.sampling_params.max_generate_length = LONGEST
    recipe.generator.eval_sampling_params.max_generate_length = LONGEST
    options = EngineOptions(
        str(base_dir), torch.float32, STOP_TOKEN_IDS, max_lora_rank, max_loras=len(ADAPTERS)
    )
    if kind != "remote":
        return build_engine(recipe, model, options)
    recipe.generator.num_inference_engines = 2 // tensor_parallel_size
    recipe.generator.inference_engine_tensor_parallel_size = tensor_parallel_size
    return start_engines(recipe, options)


def ray_for_two() -> contextlib.AbstractContextManager[object]:
    """Start Ray on this machine with two CPUs; close "remote" engines before it ends."""
    return cluster(cpus=2, gpus=0, threads=1, address=None)


def name_of(kind: Kind) -> str:
    """Return the name of a kind of engine in test ids."""
    return kind if kind == "remote" else kind.name


def marks_of(kind: Kind) -> list[pytest.MarkDecorator]:
    """Return marks: engines in actors need Ray and several processes, so their tests are slow."""
    return [pytest.mark.slow] if kind == "remote" else []


def prompt(length: int, seed: int = 0) -> list[int]:
    """Return a random prompt."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def request(
    length: int,
    member: str | None,
    *,
    n: int = 2,
    seed: int = 0,
    longest: int = LONGEST,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = -1,
) -> Request:
    """Return a request for a random prompt of `length` tokens."""
    sampling = Sampling(
        max_generate_length=longest, temperature=temperature, top_p=top_p, top_k=top_k
    )
    return Request(prompt(length), n, seed, sampling, member)


def tokens(groups: Sequence[Sequence[Sample]]) -> list[list[list[int]]]:
    """Return token ids `[P][G][T]`."""
    return [[sample.token_ids for sample in group] for group in groups]


def flat_logprobs(groups: Sequence[Sequence[Sample]]) -> torch.Tensor:
    """Return the engine's log-probabilities of all samples, concatenated."""
    return torch.tensor(
        [logprob for group in groups for sample in group for logprob in sample.logprobs]
    )


@torch.no_grad()
def next_token_logits(
    model: torch.nn.Module, member: str | None, ids: Sequence[int]
) -> torch.Tensor:
    """Return logits `[T, V]` after each token of one sequence.

    Only the member's adapter is active. None disables adapters, and is required for a plain model.
    """
    inputs = torch.tensor([list(ids)])
    if not isinstance(model, PeftModel):
        logits = model(input_ids=inputs).logits
    elif member is None:
        with model.disable_adapter():
            logits = model(input_ids=inputs).logits
    else:
        model.set_adapter(member)
        logits = model(input_ids=inputs).logits
    return logits[0]


def trainer_logprobs(
    model: torch.nn.Module,
    member: str | None,
    requests: Sequence[Request],
    groups: Sequence[Sequence[Sample]],
) -> torch.Tensor:
    """Return the trainer's log-probabilities of the samples, computed one sequence at a time."""
    selected = []
    for one, group in zip(requests, groups, strict=True):
        for sample in group:
            ids = [*one.prompt_token_ids, *sample.token_ids]
            logits = next_token_logits(model, member, ids)[len(one.prompt_token_ids) - 1 : -1]
            logprobs = (logits / (one.sampling.temperature or 1.0)).log_softmax(dim=-1)
            selected.append(
                logprobs.gather(-1, torch.tensor(sample.token_ids)[:, None]).squeeze(-1)
            )
    return torch.cat(selected)
