"""Test which settings reach vLLM.

One real engine is configured with no value at its default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from rltrain.engines.base import Request, Sample
from rltrain.engines.transformers import TransformersEngine
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[[Recipe, str], RunDir]
KEYS = (
    "backend=vllm",
    "gpu_memory_utilization=0.35",
    "cpu_kv_cache_gb=2",
    "enforce_eager=false",
    "max_num_seqs=7",
    "max_lora_rank=9",
    "batched=false",
    "max_input_length=90",
    "sampling_params.max_generate_length=30",
    "eval_sampling_params.max_generate_length=40",
    "engine_args={max_num_batched_tokens: 4321}",
)


@pytest.fixture
def running(small_recipe: MakeRecipe, new_run: MakeRun) -> Iterator[tuple[Pack, Member]]:
    """Return a pack on vLLM with one member, ready to sample."""
    recipe = small_recipe(*(f"generator.{key}" for key in KEYS))
    pack = Pack.open(recipe)
    member = pack.add(recipe, new_run(recipe, "run"))
    pack.publish(pack.members)
    yield pack, member
    pack.close()


def test_what_reaches_vllm(running: tuple[Pack, Member], monkeypatch: pytest.MonkeyPatch) -> None:
    pack, member = running
    engine: Any = pack.engine
    assert not engine.shares_weights
    config = engine._llm.llm_engine.vllm_config
    # Both have an effect only on a GPU. On a CPU the test can only see that they arrive.
    assert config.cache_config.gpu_memory_utilization == 0.35
    assert config.model_config.enforce_eager is False
    assert config.cache_config.kv_cache_memory_bytes == 2 * 2**30
    assert config.scheduler_config.max_num_seqs == 7
    assert config.scheduler_config.max_num_batched_tokens == 4321
    assert config.lora_config.max_lora_rank == 16  # vLLM has no rank 9
    assert member.recipe.trainer.policy.model.lora.rank == 8
    assert config.model_config.max_model_len == 90 + 40
    calls: list[int] = []
    generate = engine.generate

    def recording(requests: list[Request]) -> list[list[Sample]]:
        calls.append(len(requests))
        groups: list[list[Sample]] = generate(requests)
        return groups

    monkeypatch.setattr(engine, "generate", recording)
    row = train_step(pack, pack.members)[member]
    assert calls == [1] * 4
    # Sixteen samples in seven slots are still samples of the policy.
    assert row["sampling/sampling_logp_difference/mean"] < 1e-3


def test_the_transformers_backend_samples_from_the_trainers_model(small_recipe: MakeRecipe) -> None:
    pack = Pack.open(small_recipe("generator.backend=transformers"))
    assert isinstance(pack.engine, TransformersEngine)
    pack.close()
