"""vLLM's LoRA on a CPU, with few and large matrix products. Imports vllm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import vllm
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

from rltrain.engines.cpu.products import fewest_rows

VERSIONS = ("0.32.0",)
"""Versions that this was checked against; others keep their own operations."""

FEWEST_COLUMNS = 16
"""Columns of a product: below 12, MKL's rounding would depend on slots times rank."""

TOGETHER = 128
"""Slots times rank up to which one product for all slots is faster than one for each."""

Adapters = Sequence[tuple[torch.Tensor, torch.Tensor, int]]


def install() -> bool:
    """Make vLLM use `GroupedLoRA` in this process, if it runs on a CPU in a checked version.

    Returns whether it does.
    """
    fits = current_platform.is_cpu() and vllm.__version__.split("+")[0] in VERSIONS
    if fits:
        platform = type(current_platform)
        platform.get_punica_wrapper = classmethod(lambda _: f"{__name__}.{GroupedLoRA.__name__}")
    return fits


class GroupedLoRA(PunicaWrapperCPU):
    """`PunicaWrapperCPU` on linear layers with one product for all adapters, or one for each.

    vLLM's own copies A and B for every token, and applies the last slot's adapter to rows of the
    base (index -1). A row's bits here depend neither on other rows and adapters in the batch nor on
    the number of slots.
    """

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Record which rows of the batch belong to which adapter slot."""
        super().update_metadata(*args, **kwargs)
        self._groups: list[tuple[int, torch.Tensor | None]] | None = None
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Add scale * x A^T B^T to y in place.

        y is `[N, out]`, x `[N, in]`, A `[slots, 1, r, in]`, B `[slots, 1, out, r]`. q, k and v
        (gate and up) are packed: each has an A, a B and a slice of `out`.
        """
        slots, rank = lora_a_stacked[0].shape[0], lora_a_stacked[0].shape[2]
        adapters = list(zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True))
        if slots * rank <= TOGETHER:
            self._add_together(y, x, adapters, scale, self._mask(slots, rank))
        else:
            self._add_apart(y, x, adapters, scale)

    def _add_together(
        self, y: torch.Tensor, x: torch.Tensor, adapters: Adapters, scale: float, mask: torch.Tensor
    ) -> None:
        """Multiply all slots with all rows, and rows of other slots by zero."""
        missing = fewest_rows() - len(x)
        if missing > 0:
            padded, x, mask = (F.pad(rows, (0, 0, 0, missing)) for rows in (y, x, mask))
        else:
            padded = y
        parts = padded.split([size for _, _, size in adapters], dim=1)
        for part, (lora_a, lora_b, _) in zip(parts, adapters, strict=True):
            inner = (x @ _padded(lora_a.flatten(0, 2)).T).mul_(mask)
            part.addmm_(inner, _padded(lora_b[:, 0].transpose(1, 2).flatten(0, 1)), alpha=scale)
        if missing > 0:
            y.copy_(padded[: len(y)])

    def _add_apart(
        self, y: torch.Tensor, x: torch.Tensor, adapters: Adapters, scale: float
    ) -> None:
        """Multiply each slot with its own rows."""
        if self._groups is None:
            self._groups = rows_by_slot(self.token_lora_indices)
        for slot, rows in self._groups:
            outputs, inputs = (
                (y, x) if rows is None else (y.index_select(0, rows), x.index_select(0, rows))
            )
            parts = outputs.split([size for _, _, size in adapters], dim=1)
            for part, (lora_a, lora_b, _) in zip(parts, adapters, strict=True):
                inner = inputs @ _padded(lora_a[slot, 0]).T
                part.addmm_(inner, _padded(lora_b[slot, 0].T), alpha=scale)
            if rows is not None:
                y.index_copy_(0, rows, outputs)

    def _mask(self, slots: int, rank: int) -> torch.Tensor:
        """Return `[N, >= slots * r]`: one in the columns of a row's adapter, zero elsewhere."""
        if (slots, rank) not in self._masks:
            active = self.token_lora_indices[:, None] == torch.arange(slots)
            missing = max(0, FEWEST_COLUMNS - slots * rank)
            self._masks[slots, rank] = F.pad(
                active.repeat_interleave(rank, dim=1).float(), (0, missing)
            )
        return self._masks[slots, rank]


def _padded(matrix: torch.Tensor) -> torch.Tensor:
    """Return A or B^T with rows of zeros up to `FEWEST_COLUMNS`."""
    missing = FEWEST_COLUMNS - len(matrix)
    return F.pad(matrix, (0, 0, 0, missing)) if missing > 0 else matrix


def rows_by_slot(slot_N: torch.Tensor) -> list[tuple[int, torch.Tensor | None]]:
    """Return (slot, rows) for each adapter in the batch; None stands for all rows.

    Few rows are repeated up to `fewest_rows`.
    """
    fewest = fewest_rows()
    slots = slot_N.unique().tolist()
    if len(slots) == 1 and len(slot_N) >= fewest:
        return [(slots[0], None)] if slots[0] >= 0 else []
    groups: list[tuple[int, torch.Tensor | None]] = []
    for slot in slots:
        if slot >= 0:
            rows = (slot_N == slot).nonzero().squeeze(1)
            missing = fewest - len(rows)
            groups.append(
                (slot, torch.cat([rows, rows[:1].expand(missing)]) if missing > 0 else rows)
            )
    return groups
