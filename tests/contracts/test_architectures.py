"""Load, adapt, train and sample from tiny random Qwen2, Qwen3 and Llama models."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from harness.config import recipe as recipes
from harness.config.schema import Recipe, Sampling
from harness.config.validate import sync_mode
from rltrain.data.batch import Batch, collate
from rltrain.engines.base import (
    Engine,
    EngineOptions,
    Request,
    Sample,
    build_engine,
    stop_token_ids,
)
from rltrain.models.loading import (
    adapter_layers,
    adapter_parameters,
    add_adapter,
    load_base,
    lora_config,
)
from rltrain.models.logprobs import token_logprobs
from rltrain.models.lora import adapter_off
from rltrain.sync.registry import build_sync
from tests.recipes import quickstart

LAYERS = 2
# The embedding has more rows than the tokenizer has tokens, as in real models.
COMMON: dict[str, Any] = {
    "vocab_size": 896,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 836,
}
# The features that distinguish the families: biases on q, k and v; norms of q and k; scaled
# positions and an untied head.
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**{**COMMON, "num_attention_heads": 2}, tie_word_embeddings=True),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**COMMON, tie_word_embeddings=True)),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            **COMMON,
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
}
TARGETS = {
    "all-linear": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
MEMBERS = {targets: f"on_{targets}" for targets in TARGETS}
CHATS = [
    "Tom has 3 apples.",
    "Ann buys 12 pens and gives 5 away. How many pens does Ann have left?",
    "2 + 2?",
]


@dataclass(frozen=True)
class Case:
    """Recipe and model of an architecture: a frozen base with several adapters, B not zero."""

    recipe: Recipe
    model: PeftModel
    tokenizer: Any

    def engine(self, backend: str) -> Engine:
        """Return a new engine that serves the base and, once published, the adapters."""
        recipe = recipes.with_values(self.recipe, {"generator.backend": backend})
        stops = stop_token_ids(self.model, self.tokenizer)
        options = EngineOptions(
            recipe.trainer.policy.model.path, torch.float32, stops, 4, max_loras=len(TARGETS)
        )
        return build_engine(recipe, self.model, options)

    def requests(self, member: str | None, temperature: float) -> list[Request]:
        """Return requests for three samples of each of CHATS."""
        prompts = self.tokenizer.apply_chat_template(
            [[{"role": "user", "content": chat}] for chat in CHATS],
            add_generation_prompt=True,
            return_dict=False,
        )
        sampling = Sampling(max_generate_length=24, temperature=temperature)
        return [Request(ids, 3, seed, sampling, member) for seed, ids in enumerate(prompts)]

    def logprobs(self, member: str | None, batch: Batch, temperature: float) -> torch.Tensor:
        """Return the trainer's log-probabilities of all completions, concatenated.

        Member None means the base.
        """
        with torch.no_grad():
            if member is None:
                with adapter_off(self.model):
                    values = token_logprobs(self.model, batch, temperature)
            else:
                self.model.set_adapter(member)
                values = token_logprobs(self.model, batch, temperature)
        return values[batch.mask.bool()]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    write_model(request.param, folder, tiny_model_dir)
    recipe = quickstart(
        [
            f"trainer.policy.model.path={folder}",
            "trainer.policy.model.lora.rank=4",
            "generator.backend=transformers",
        ]
    )
    model: PreTrainedModel | PeftModel
    model, tokenizer = load_base(recipe)
    for seed, targets in enumerate(TARGETS):
        adapter_recipe = recipes.with_values(recipe, {"trainer.target_modules": targets})
        model = add_adapter(
            model,
            MEMBERS[targets],
            lora_config(adapter_recipe, adapter_recipe.trainer.policy.model.lora),
            seed,
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert isinstance(model, PeftModel)
    return Case(recipe, model.eval(), tokenizer)


def write_model(architecture: str, folder: Path, tokenizer_dir: Path) -> None:
    torch.manual_seed(0)
    model_class, config = ARCHITECTURES[architecture]
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Sharper than the usual initialisation, so that samples are not uniform.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_dir / name, folder / name)


def collated(requests: Sequence[Request], groups: Sequence[Sequence[Sample]]) -> Batch:
    samples = [sample for group in groups for sample in group]
    prompts = [request.prompt_token_ids for request in requests for _ in range(request.n)]
    return collate(prompts, [s.token_ids for s in samples], [s.logprobs for s in samples], pad_id=0)


def assert_served(case: Case, engine: Engine) -> None:
    """Assert that engine and trainer agree on the log-probabilities of samples.

    Samples come from every adapter and from the base.
    """
    for member, temperature in [
        *((name, 1.0) for name in MEMBERS.values()),
        (None, 1.0),
        ("on_all-linear", 0.7),
    ]:
        requests = case.requests(member, temperature)
        batch = collated(requests, engine.generate(requests))
        sampled = batch.engine_logprobs[batch.mask.bool()]
        torch.testing.assert_close(
            sampled, case.logprobs(member, batch, temperature), atol=1e-4, rtol=0
        )
        for other in {None, *MEMBERS.values()} - {member}:
            assert (sampled - case.logprobs(other, batch, temperature)).abs().mean() > 0.01


def test_the_base_is_loaded_frozen_in_float32_with_its_tokenizer(
    case: Case, tiny_model_dir: Path
) -> None:
    base = [p for name, p in case.model.named_parameters() if "lora_" not in name]
    assert {p.dtype for p in base} == {torch.float32}
    assert not any(p.requires_grad for p in base)
    ((name, parameter),) = [
        (n, p) for n, p in case.model.named_parameters() if n.endswith("embed_tokens.weight")
    ]
    assert parameter.shape == (896, 64), name
    text = "Ann has 17 pens, 2 of them blue.\n#### 17"
    assert case.tokenizer.decode(case.tokenizer(text)["input_ids"]) == text
    template = (tiny_model_dir / "chat_template.jinja").read_text()
    assert case.tokenizer.chat_template == template


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_is_on_its_modules_in_every_layer_and_trains(case: Case, targets: str) -> None:
    layers = adapter_layers(case.model, MEMBERS[targets])
    assert len(layers) == LAYERS * len(TARGETS[targets])
    assert {name.rsplit(".", 1)[-1] for name in layers} == TARGETS[targets]

    case.model.set_adapter(MEMBERS[targets])
    batch = collate([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], [[0.0] * 2, [0.0] * 3], pad_id=0)
    parameters = adapter_parameters(case.model, MEMBERS[targets])
    (token_logprobs(case.model, batch, 1.0) * batch.mask).sum().backward()
    assert len(parameters) == 2 * len(layers)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
    assert all(
        p.grad is None for name, p in case.model.named_parameters() if name not in parameters
    )
    case.model.zero_grad(set_to_none=True)


def test_logprobs_do_not_depend_on_padding(case: Case) -> None:
    prompts = [list(request.prompt_token_ids) for request in case.requests(None, 1.0)]
    completions = [[20, 30, 40, 50], [60], [70, 80]]
    zeros = [[0.0] * len(completion) for completion in completions]
    batch = collate(prompts, completions, zeros, pad_id=0)
    together = case.logprobs("on_all-linear", batch, 1.0)
    alone = [
        case.logprobs("on_all-linear", collate([p], [c], [z], pad_id=0), 1.0)
        for p, c, z in zip(prompts, completions, zeros, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_the_transformers_engine_samples_what_the_trainer_computes(case: Case) -> None:
    assert_served(case, case.engine("transformers"))


def test_a_random_models_completions_decode(case: Case) -> None:
    (group, *_) = case.engine("transformers").generate(case.requests(None, 1.0))
    # 895 is beyond the tokenizer's tokens.
    sample = Sample([*group[0].token_ids, 895, 5], [0.0], "length")
    assert case.tokenizer.batch_decode([sample.token_ids], skip_special_tokens=True)[0].endswith(
        case.tokenizer.decode([5])
    )


@pytest.mark.parametrize(
    "case",
    ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "llama"))],
    indirect=True,
)
def test_vllm_serves_the_base_and_its_adapters(case: Case, tmp_path: Path) -> None:
    engine = case.engine("vllm")
    try:
        sync = build_sync(sync_mode(case.recipe.trainer.policy.model.lora), tmp_path)
        for member in MEMBERS.values():
            sync.publish(engine, case.model, member, 1)
        assert_served(case, engine)
    finally:
        engine.close()
