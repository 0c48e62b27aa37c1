"""`generator.engine_args`: arguments of vLLM, and those that a key sets."""

from __future__ import annotations

import itertools

import pytest

from harness.core import machine
from harness.core.errors import UserError
from rltrain.distributed.placement import pack_key
from rltrain.engines.arguments import OF_ENGINE, OF_KEYS, check_engine_args
from rltrain.tools.preflight import check_run
from tests.recipes import quickstart

needs_vllm = pytest.mark.skipif(
    not machine.has_vllm(), reason="vLLM's arguments are read from its source"
)


@needs_vllm
def test_names_are_vllms() -> None:
    known = machine.vllm_arguments()
    assert {
        *OF_KEYS,
        *OF_ENGINE,
        "max_num_batched_tokens",
        "kv_cache_memory_bytes",
        "compilation_config",
        "async_scheduling",
    } <= known
    assert "from_engine_args" not in known
    check_engine_args(quickstart(["generator.engine_args={max_num_batched_tokens: 4096}"]))


@needs_vllm
@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("max_num_batched_token: 4096", "did you mean max_num_batched_tokens?"),
        ("max_num_sequences: 4", "vLLM has no argument of this name"),
        ("max_num_seqs: 4", "set generator.max_num_seqs"),
        ("dtype: float16", "set trainer.policy.model.dtype"),
        ("enable_sleep_mode: false", "set trainer.placement.colocate_all"),
        ("logprobs_mode: raw_logprobs", "the engine itself sets this"),
    ],
)
def test_bad_names_are_explained_before_anything_starts(
    tiny_model_dir: object, argument: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_run(quickstart([f"generator.engine_args={{{argument}}}"]))
    assert told in str(caught.value)
    assert f"generator.engine_args.{argument.split(':')[0]}" in str(caught.value)


def test_without_vllm_only_our_names_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "vllm_arguments", frozenset)
    check_engine_args(quickstart(["generator.engine_args={anything: 1}"]))
    with pytest.raises(UserError, match="set seed"):
        check_engine_args(quickstart(["generator.engine_args={seed: 1}"]))


def test_runs_with_other_arguments_share_no_engine() -> None:
    keys = [
        pack_key(quickstart(overrides))
        for overrides in (
            [],
            ["generator.engine_args={max_num_batched_tokens: 4096}"],
            ["generator.engine_args={max_num_batched_tokens: 8192}"],
            ["deterministic=true"],
        )
    ]
    assert all(one != other for one, other in itertools.combinations(keys, 2))
    assert pack_key(quickstart([])) == keys[0]
