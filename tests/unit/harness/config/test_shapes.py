"""Sizes of models: by config.json, by the hub's cache, and as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.config.shapes import ModelShape, shape_from, shape_of
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
        {"num_local_experts": 8},
    ],
)
def test_what_does_not_say_its_sizes_or_has_experts_has_none(changed: dict[str, Any]) -> None:
    assert shape_from(json.loads((PROJECT / TINY / "config.json").read_text()) | changed) is None


def test_a_folder_without_a_sound_config_has_none(tmp_path: Path) -> None:
    assert shape_of(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("[1")
    assert shape_of(str(tmp_path)) is None


def test_adapters_of_the_embedded_model_by_hand() -> None:
    shape = shape_of(TINY)
    assert shape is not None
    # Three layers of hidden 128 and inner 384: four projections of 128 + 128, three of 128 + 384.
    assert shape.adapter_parameters(1) == 3 * (4 * 256 + 3 * 512)
    assert shape.adapter_parameters(8, ["q_proj", "k_proj", "v_proj", "o_proj"]) == 8 * 3 * 4 * 256
    grouped = ModelShape(128, 3, 4, 1, 64, 384, 840, True)
    assert grouped.adapter_parameters(1, ["q_proj", "k_proj"]) == 3 * (128 + 4 * 64 + 128 + 64)
