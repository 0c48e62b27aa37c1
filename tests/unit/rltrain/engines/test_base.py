"""Seeds, stop tokens and the registry of engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from harness.config.schema import Backend, Sampling
from harness.core.errors import UserError
from rltrain.engines.base import (
    ENGINES,
    Request,
    check_prompts,
    in_parts,
    sample_seed,
    stop_token_ids,
    unknown_member,
)


def test_every_backend_of_the_schema_has_an_engine() -> None:
    assert set(ENGINES) == set(Backend)
    assert all(importlib.util.find_spec(module) for module in ENGINES.values())


def test_sample_seeds_are_all_different_and_fit_64_bits() -> None:
    seeds = {sample_seed(seed, index) for seed in range(100) for index in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_sample_seeds_stay_the_same() -> None:
    assert [sample_seed(0, 0), sample_seed(2**62, 7)] == [2928822574489494037, 8793863379381506527]


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ([151645, 151643], 151645, 151645, (151643, 151645)),
        (None, 2, None, (2,)),
        (None, None, 0, (0,)),
        (None, None, None, ()),
    ],
)
def test_stop_tokens_are_the_eos_of_all(
    generation: object, config: object, tokenizer: object, expected: tuple[int, ...]
) -> None:
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=generation),
        config=SimpleNamespace(eos_token_id=config),
    )
    assert stop_token_ids(model, SimpleNamespace(eos_token_id=tokenizer)) == expected


def test_prompts_are_checked_before_anything_runs() -> None:
    def request(length: int) -> Request:
        return Request(range(length), 1, 0, Sampling())

    check_prompts([request(1), request(8)], 8)
    with pytest.raises(UserError, match=r"(?s)request 1.*9 tokens.*1 to 8"):
        check_prompts([request(8), request(9)], 8)


def test_an_unknown_member_is_named_with_those_there_are() -> None:
    assert "got:     c\n  allowed: a, b" in str(unknown_member("c", ["b", "a"]))
    assert "none is loaded" in str(unknown_member("c", []))


def test_weights_come_in_parts_of_limited_size() -> None:
    sizes = {"a": 3, "b": 3, "c": 4, "d": 25, "e": 1, "f": 9}
    weights = [(name, torch.zeros(size, dtype=torch.uint8)) for name, size in sizes.items()]
    parts = [[name for name, _ in part] for part in in_parts(iter(weights), limit=10)]
    assert parts == [["a", "b", "c"], ["d"], ["e", "f"]]
    assert list(in_parts([], limit=10)) == []


def test_weights_are_not_taken_before_their_part_is_wanted() -> None:
    taken = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abcd":
            taken.append(name)
            yield name, torch.zeros(4)

    next(in_parts(weights(), limit=32))
    assert taken == ["a", "b", "c"]
