"""Test log-probabilities and gradients on a GPU.

They are compared with float32, with the CPU, and with one sequence at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu import ours

if TYPE_CHECKING:
    from tests.gpu.conftest import OpenPack

pytestmark = pytest.mark.gpu


def sequences(prompts: int, samples: int, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return random prompts, repeated for each completion, and random completions.

    Both have unequal lengths.
    """
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(10, 800) for _ in range(count)]

    shared = [ids(length - 5 * index) for index in range(prompts) for _ in range(samples)]
    for index in range(len(shared)):
        shared[index] = shared[index - index % samples]
    return shared, [ids(length - index % 3) for index in range(len(shared))]


def evaluated(pack: Any, member: Any, texts: tuple[list[list[int]], list[list[int]]]) -> Any:
    import torch

    with torch.no_grad():
        return ours.logprobs(pack, member, ours.batch_of(*texts)).cpu()


def test_bfloat16_is_near_float32(open_pack: OpenPack, model_of: Callable[..., Path]) -> None:
    texts = sequences(prompts=4, samples=4, length=64)
    whole = model_of(layers=24)
    values = [
        evaluated(pack, members[0], texts)
        for pack, members in (
            open_pack({ours.DTYPE: dtype}, model=whole) for dtype in ("float32", "bfloat16")
        )
    ]
    difference = (values[0] - values[1]).abs()
    real = values[0] != 0
    assert 0 < float(difference[real].mean()) < 0.01
    assert float(difference.max()) < 0.2


def test_logprobs_are_the_cpus(open_pack: OpenPack) -> None:
    texts = sequences(prompts=2, samples=4, length=32)
    on_gpu, on_cpu = open_pack(), open_pack(on="cpu")
    difference = evaluated(on_gpu[0], on_gpu[1][0], texts) - evaluated(
        on_cpu[0], on_cpu[1][0], texts
    )
    assert float(difference.abs().max()) < 1e-3


def test_gradients_are_the_cpus(open_pack: OpenPack) -> None:
    texts = sequences(prompts=2, samples=4, length=32)
    results = [
        ours.gradients(pack, members[0], ours.batch_of(*texts))
        for pack, members in (open_pack(), open_pack(on="cpu"))
    ]
    assert distance(*results) < 1e-3


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the norm of the difference of two sets of tensors over the norm of the second."""
    import torch

    assert one.keys() == other.keys()
    apart, size = (
        torch.cat([tensor.detach().cpu().flatten() for tensor in tensors])
        for tensors in ([one[name].cpu() - other[name].cpu() for name in one], other.values())
    )
    assert float(size.norm()) > 0
    return float(apart.norm() / size.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.2)])
@pytest.mark.parametrize("samples", [1, 4])
def test_packed_rows_are_those_of_one_sequence_at_a_time(
    open_pack: OpenPack, samples: int, dtype: str, tolerance: float
) -> None:
    prompts, completions = texts = sequences(prompts=4, samples=samples, length=32)
    pack, (member,) = open_pack({ours.DTYPE: dtype})
    values = evaluated(pack, member, texts)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        alone = ours.plain_logprobs(pack, member, prompt, completion).cpu()
        assert near(values[row, : len(completion)], alone, tolerance)
        assert not values[row, len(completion) :].any()


def near(one: Any, other: Any, tolerance: float) -> bool:
    return float((one - other).abs().max()) < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_says_what_the_trainer_says(open_pack: OpenPack, dtype: str) -> None:
    prompts: Sequence[list[int]] = sequences(prompts=4, samples=1, length=32)[0]
    pack, (member,) = open_pack({ours.DTYPE: dtype})
    with ours.real_engine(pack):
        groups = ours.sample(pack, member, prompts, n=4, longest=16)
        again = ours.sample(pack, member, prompts, n=4, longest=16)
    samples = [sample for group in groups for sample in group]
    assert [sample.token_ids for sample in samples] == [
        sample.token_ids for group in again for sample in group
    ]
    texts = (
        [prompt for prompt in prompts for _ in range(4)],
        [sample.token_ids for sample in samples],
    )
    values = evaluated(pack, member, texts)
    gaps = [
        abs(value - float(values[row, index]))
        for row, sample in enumerate(samples)
        for index, value in enumerate(sample.logprobs)
    ]
    assert sum(gaps) / len(gaps) < (1e-4 if dtype == "float32" else 0.02)
