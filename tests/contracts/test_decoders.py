"""Compare both decoders' log-probabilities with those of the trainer's model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rltrain.engines.base import Request, Sample
from rltrain.engines.cpu import decoder as llama
from rltrain.engines.transformers import TransformersEngine
from tests.contracts.tiny import (
    STOP_TOKEN_IDS,
    VOCAB,
    flat_logprobs,
    prompt,
    request,
    shake,
    trainer_logprobs,
)

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
MEMBERS = ("wide", "narrow", None)


def _llama() -> PreTrainedModel:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            num_key_value_heads=2,
            rope_parameters=rope,
            mlp_bias=True,
            attention_bias=True,
            tie_word_embeddings=False,
        )
    )


def _qwen2() -> PreTrainedModel:
    # MKL uses another kernel for fewer than 16 rows of this width.
    wide = SIZES | {"intermediate_size": 384}
    return Qwen2ForCausalLM(Qwen2Config(**wide, num_key_value_heads=4, tie_word_embeddings=True))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(
        Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=24, tie_word_embeddings=True)
    )


def _sliding() -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(
            **SIZES,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        )
    )


def _neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


OF_THE_FAMILY = [_llama, _qwen2, _qwen3]
OTHERS = [_sliding, _neox]


def _model(build: object) -> PeftModel:
    """Return a model of the architecture with random weights and two adapters, B not zero."""
    assert callable(build)
    torch.manual_seed(0)
    base = build()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.15)
    some = ["query_key_value"] if build is _neox else ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"), adapter_name="wide"
    )
    model.add_adapter("narrow", LoraConfig(r=1, lora_alpha=4, target_modules=some, use_rslora=True))
    for member in ("wide", "narrow"):
        shake(model, member, seed=1)
    return model.eval()


def _engine(model: object, max_num_seqs: int = 512) -> TransformersEngine:
    return TransformersEngine(model, STOP_TOKEN_IDS, 96, max_num_seqs)


def _requests(
    lengths: Iterable[int] = (1, 4, 31, 32, 33, 90), members: Iterable[str | None] = MEMBERS
) -> list[Request]:
    return [
        request(length, member, n=1 + length % 4, seed=length)
        for length in lengths
        for member in members
    ]


def _gap(
    model: torch.nn.Module, requests: Sequence[Request], groups: Sequence[Sequence[Sample]]
) -> float:
    """Return the largest difference between the engine's log-probabilities and the trainer's."""
    largest = 0.0
    for one, group in zip(requests, groups, strict=True):
        expected = trainer_logprobs(model, one.member, [one], [group])
        largest = max(largest, float((flat_logprobs([group]) - expected).abs().max()))
    return largest


@pytest.mark.parametrize("build", [*OF_THE_FAMILY, *OTHERS])
def test_decoder_and_trainer_agree_for_every_architecture(build: object) -> None:
    model = _model(build)
    assert [llama.supports(model, member) for member in MEMBERS] == [build in OF_THE_FAMILY] * 3
    requests = _requests()
    assert _gap(model, requests, _engine(model).generate(requests)) < 1e-5


@pytest.mark.parametrize("build", OF_THE_FAMILY)
def test_the_base_is_restored_to_the_bit(build: object) -> None:
    model = _model(build)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _engine(model).generate(_requests())
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("build", OF_THE_FAMILY)
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(build: object) -> None:
    engine = _engine(_model(build))
    requests = _requests()
    together = engine.generate(requests)
    assert engine.generate(list(reversed(requests))) == list(reversed(together))
    for one, group in zip(requests, together, strict=True):
        assert engine.generate([one]) == [group]
        assert engine.generate(
            [Request(one.prompt_token_ids, 1, one.seed, one.sampling, one.member)]
        ) == [group[:1]]


def test_batches_of_any_size_give_the_same_bits() -> None:
    model = _model(_qwen2)
    requests = _requests()
    assert _engine(model, 512).generate(requests) == _engine(model, 5).generate(requests)


def test_decoding_continues_when_most_of_a_batch_has_ended() -> None:
    model = _model(_llama)
    requests = [request(20 + seed % 5, "wide", n=16, seed=seed, longest=80) for seed in range(8)]
    groups = _engine(model).generate(requests)
    lengths = sorted(len(sample.token_ids) for group in groups for sample in group)
    assert lengths[len(lengths) // 2] < 30
    assert lengths[-1] > 33  # longer than the first allocation for keys and values
    assert _gap(model, requests, groups) < 2e-5


def test_a_plain_model_serves_its_own_weights() -> None:
    model = _model(_qwen3).unload()
    requests = _requests(members=[None])
    for _ in range(2):
        assert _gap(model, requests, _engine(model).generate(requests)) < 1e-5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
        LoraConfig(r=2, target_modules=["embed_tokens"]),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
)
def test_adapters_beyond_plain_lora_use_the_models_forward_pass(config: LoraConfig) -> None:
    model = get_peft_model(_llama(), config, adapter_name="other")
    assert not llama.supports(model, "other")


def test_half_precision_uses_the_models_forward_pass() -> None:
    assert not llama.supports(_qwen2().bfloat16(), None)


def test_a_prompt_is_computed_once_for_all_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(_qwen2)
    prefilled: list[int] = []
    inner = llama.LlamaDecoder._prefill_part

    def watch(
        self: llama.LlamaDecoder, prompts: Sequence[Sequence[int]], start: int, stop: int
    ) -> torch.Tensor:
        prefilled.extend(len(one) for one in prompts[start:stop])
        return inner(self, prompts, start, stop)

    monkeypatch.setattr(llama.LlamaDecoder, "_prefill_part", watch)
    one = request(7, "wide", n=9)
    _engine(model).generate([one, Request(prompt(12), 3, 1, one.sampling, "wide")])
    assert prefilled == [7, 12]
