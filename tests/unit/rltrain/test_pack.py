"""In which order a pack takes memory: a base is sharded before the engine looks at what is free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rltrain import pack as packs
from rltrain.distributed.process_group import Ranks
from rltrain.models import loading as models
from tests.recipes import quickstart

TWO = ["trainer.placement.policy_num_gpus_per_node=2", "generator.num_inference_engines=2"]


class Recorded(Ranks):
    """One of two ranks, whose sharding is noted."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(0, 2)
        self._events = events

    def shard(self, model: Any, computes_in: torch.dtype) -> None:
        self._events.append(f"sharded in {computes_in}")


def test_the_base_is_sharded_before_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(packs, "place_engine", lambda *_: events.append("engine"))
    recipe = quickstart(TWO)
    packs.Pack(recipe, *models.load_base(recipe), 1, Recorded(events))
    assert events == ["sharded in torch.float32", "engine"]


@pytest.mark.parametrize(("overrides", "moved"), [([], True), (TWO, False)])
def test_a_base_to_be_sharded_is_not_put_on_a_gpu_whole(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], moved: bool
) -> None:
    recipe = quickstart(overrides)
    devices: list[Any] = []
    loaded = AutoModelForCausalLM.from_pretrained

    def watched(*arguments: Any, **settings: Any) -> Any:
        model, found = loaded(*arguments, **settings)

        def to(device: Any) -> Any:
            devices.append(device)
            return model

        monkeypatch.setattr(model, "to", to)
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    models.load_model(
        recipe.trainer.policy.model.path, recipe, key="trainer.policy.model.path", full=False
    )
    assert bool(devices) is moved
