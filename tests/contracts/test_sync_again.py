"""Test memory sync of later versions, which reuses tensors while they are valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from harness.config.schema import Backend
from rltrain.engines.base import Engine
from rltrain.sync.disk import adapter_tensors
from rltrain.sync.memory import AdapterTensors, MemorySync
from tests.contracts.tiny import (
    ADAPTERS,
    adapt,
    flat_logprobs,
    load_base,
    request,
    shake,
    start,
    trainer_logprobs,
)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.mark.parametrize("member", ADAPTERS)
def test_reused_tensors_follow_the_trainer(base_dir: Path, member: str) -> None:
    model = adapt(load_base(base_dir))
    known = AdapterTensors(model, member)
    for seed in (3, 4):
        shake(model, member, seed)
        assert known.fits(model)
        assert _same(known.now(), adapter_tensors(model, member))


def test_another_adapter_of_the_same_name_is_detected(base_dir: Path) -> None:
    model = adapt(load_base(base_dir))
    known = AdapterTensors(model, "attention")
    model.delete_adapter("attention")
    assert not known.fits(model)
    model.add_adapter(
        "attention", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    )
    assert not known.fits(model)


def _check(engine: Engine, model: PeftModel) -> None:
    asked = [request(length, member) for length in (4, 40) for member in ADAPTERS]
    for one, group in zip(asked, engine.generate(asked), strict=True):
        expected = trainer_logprobs(model, one.member, [one], [group])
        assert torch.allclose(flat_logprobs([group]), expected, atol=1e-4)


def test_a_later_version_reuses_the_memory_of_the_previous_version(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(load_base(base_dir))
    engine = start(Backend.vllm, model, base_dir)
    rpc, calls = engine._llm.collective_rpc, []  # type: ignore[attr-defined]

    def watch(name: str, **kwargs: object) -> object:
        calls.append(name)
        return rpc(name, **kwargs)

    monkeypatch.setattr(engine._llm, "collective_rpc", watch)  # type: ignore[attr-defined]
    try:
        sync = MemorySync()
        for version in (1, 2):
            for member in ADAPTERS:
                shake(model, member, seed=10 * version)
                before = {
                    name: tensor.clone() for name, tensor in adapter_tensors(model, member).items()
                }
                sync.publish(engine, model, member, version)
                assert _same(before, adapter_tensors(model, member))
            _check(engine, model)
        assert calls == ["add_adapter", "modules_served"] * 2 + ["update_adapter"] * 2
        # Another alpha is another adapter, although its tensors have the same shapes.
        model.peft_config["attention"].lora_alpha *= 2
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and "attention" in layer.scaling:
                layer.scaling["attention"] *= 2
        sync.publish(engine, model, "attention", 3)
        assert calls[-2:] == ["add_adapter", "modules_served"]
        _check(engine, model)
    finally:
        engine.close()
