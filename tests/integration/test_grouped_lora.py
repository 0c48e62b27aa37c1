"""Compare LoRA products grouped by adapter with vLLM's operations."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

SLOTS, MOST_SLOTS = 4, 24
WIDTHS = [128, 384]  # MKL uses different kernels for few rows, depending on the width
RANKS = [8, 64]  # computed for all slots together, and for each slot apart
OUT = (128, 64, 64)


def _applied(
    wrapper: type,
    slot_of_row: list[int],
    *,
    rank: int = 8,
    prefill: bool = False,
    slots: int = SLOTS,
    width: int = WIDTHS[0],
) -> torch.Tensor:
    """Return y of a packed layer after the adapters were added.

    Adapter ids 1, 2, ... are in slots 0, 1, ...; id 0 is the base.
    """
    from vllm.lora.layers import LoRAMapping

    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    a = tuple(normal(MOST_SLOTS, 1, rank, width)[:slots] for _ in OUT)
    b = tuple(normal(MOST_SLOTS, 1, size, rank)[:slots] for size in OUT)
    x, y = (
        rows[: len(slot_of_row)].clone() for rows in (normal(512, width), normal(512, sum(OUT)))
    )
    ids = tuple(slot + 1 for slot in slot_of_row)
    punica: Any = wrapper(1024, 512, "cpu")
    punica.update_metadata(
        LoRAMapping(ids, ids, is_prefill=prefill), list(range(1, slots + 1)), slots, 100
    )
    punica.add_lora_linear(y, x, a, b, 0.5, OUT)
    return y


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("rows", [[0] * 512, [0, 1, 2, 3] * 40, [3] * 5 + [1], [2]])
def test_results_equal_those_of_vllms_operations(rows: list[int], prefill: bool, rank: int) -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from rltrain.engines.cpu.grouped_lora import GroupedLoRA

    actual, expected = (
        _applied(one, rows, rank=rank, prefill=prefill) for one in (GroupedLoRA, PunicaWrapperCPU)
    )
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("rank", RANKS)
def test_rows_of_the_base_do_not_change(rank: int) -> None:
    from rltrain.engines.cpu.grouped_lora import GroupedLoRA

    for times in (1, 20):
        mixed = _applied(GroupedLoRA, [-1, 0, -1, 1] * times, rank=rank)
        base = _applied(GroupedLoRA, [-1, -1, -1, -1] * times, rank=rank)
        assert (mixed != base).any(dim=1).tolist() == [False, True, False, True] * times


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_other_rows(threads: int, width: int, rank: int) -> None:
    from rltrain.engines.cpu.grouped_lora import GroupedLoRA

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = _applied(GroupedLoRA, [0] * 300, rank=rank, width=width)
        for count in (1, 2, 3, 4, 5, 7, 9, 11, 15, 64, 299):
            assert torch.equal(
                _applied(GroupedLoRA, [0] * count, rank=rank, width=width), alone[:count]
            )
            company = [0] * count + [random.Random(count).randrange(-1, SLOTS) for _ in range(200)]
            assert torch.equal(
                _applied(GroupedLoRA, company, rank=rank, width=width)[:count], alone[:count]
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rank", [1, 8, 16, 32])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_number_of_slots(threads: int, rank: int) -> None:
    from rltrain.engines.cpu.grouped_lora import GroupedLoRA

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (1, 7, 64, 300):
            alone = _applied(GroupedLoRA, [0] * count, rank=rank, slots=1)
            for slots in (2, 3, 4, 8, MOST_SLOTS):
                company = [0] * count + [
                    random.Random(count).randrange(-1, slots) for _ in range(200)
                ]
                assert torch.equal(
                    _applied(GroupedLoRA, company, rank=rank, slots=slots)[:count], alone
                ), slots
    finally:
        torch.set_num_threads(before)


def test_only_known_vllm_versions_are_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.platforms import current_platform

    from rltrain.engines.cpu import grouped_lora

    stock = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
    platform = type(current_platform)
    monkeypatch.setattr(platform, "get_punica_wrapper", classmethod(lambda _: stock))
    monkeypatch.setattr(vllm, "__version__", "9.9.9")
    assert not grouped_lora.install()
    assert platform.get_punica_wrapper() == stock
    monkeypatch.setattr(vllm, "__version__", f"{grouped_lora.VERSIONS[0]}+cpu")
    assert grouped_lora.install()
    assert platform.get_punica_wrapper() == "rltrain.engines.cpu.grouped_lora.GroupedLoRA"
