"""Sizes of models: by config.json, by the hub's cache, and as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.config.shapes import MLP, ModelShape, shape_from, shape_of
from harness.core.paths import PROJECT

TINY = "rltrain/assets/tiny_gsm"
# Totals that the models' cards and papers give, norms and biases included.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "unsloth/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Meta-Llama-3.1-8B-Instruct": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
}


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_published_models_have_their_published_parameters(name: str, total: int) -> None:
    shape = shape_of(name)
    assert shape is not None
    assert shape.parameters == pytest.approx(total, rel=2e-3)


def test_a_tokens_keys_and_values() -> None:
    shape = shape_of("Qwen/Qwen3-0.6B")  # its heads are wider than hidden / heads
    assert shape is not None
    assert shape.cache_bytes_per_token(2) == 2 * 28 * 8 * 128 * 2
    assert shape.cache_bytes_per_token(4, split=3) == 2 * 28 * 3 * 128 * 4


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-0.5B-Instruct-GPTQ-Int4", "google/bert", "a b/c", "nowhere", "x/y/z"]
)
def test_a_name_that_nobody_knows_has_no_sizes(name: str) -> None:
    assert shape_of(name) is None


def test_the_hubs_cache_comes_before_what_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--theirs"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    config = json.loads((PROJECT / TINY / "config.json").read_text())
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    assert (
        shape_of("someone/theirs") == shape_of(TINY) == ModelShape(128, 3, 4, 4, 32, 384, 840, True)
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"vocab_size": "840"},
        {"num_hidden_layers": True},
        {"num_local_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2},
        {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64},
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ],
)
def test_what_does_not_say_its_sizes_or_has_layers_of_two_kinds_has_none(
    changed: dict[str, Any],
) -> None:
    assert shape_from(json.loads((PROJECT / TINY / "config.json").read_text()) | changed) is None


def test_a_folder_without_a_sound_config_has_none(tmp_path: Path) -> None:
    assert shape_of(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("[1")
    assert shape_of(str(tmp_path)) is None


def test_of_a_mixture_only_the_active_experts_compute() -> None:
    # Qwen3-30B-A3B: 30.5 B parameters, 3.3 B of them active.
    config = {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "vocab_size": 151_936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    shape = shape_from(config)
    assert shape is not None
    assert shape.parameters == pytest.approx(30.5e9, rel=0.005)
    assert shape.active_parameters == pytest.approx(3.3e9, rel=0.02)
    # An adapter has gate and up together: 2048 + 2 * 768, and 768 + 2048 down.
    on_experts = 48 * 128 * (2048 + 2 * 768 + 768 + 2048)
    assert shape.adapter_parameters(32, MLP) == 4 * on_experts
    assert shape.adapter_parameters(32, MLP, expert_rank=3) == 3 * on_experts
    assert shape.adapter_parameters(4, MLP) == on_experts
    attention = 48 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert shape.adapter_parameters(32) == 32 * attention + 4 * on_experts


def test_a_dense_models_parameters_are_all_active() -> None:
    shape = shape_of(TINY)
    assert shape is not None
    assert shape.active_parameters == shape.parameters


def test_adapters_of_the_embedded_model_by_hand() -> None:
    shape = shape_of(TINY)
    assert shape is not None
    # Three layers of hidden 128 and inner 384: four projections of 128 + 128, three of 128 + 384.
    assert shape.adapter_parameters(1) == 3 * (4 * 256 + 3 * 512)
    assert shape.adapter_parameters(8, ["q_proj", "k_proj", "v_proj", "o_proj"]) == 8 * 3 * 4 * 256
    grouped = ModelShape(128, 3, 4, 1, 64, 384, 840, True)
    assert grouped.adapter_parameters(1, ["q_proj", "k_proj"]) == 3 * (128 + 4 * 64 + 128 + 64)
