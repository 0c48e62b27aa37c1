"""vLLM's LoRA on a CPU, with few and large matrix products. Beside vllm.py, it imports vllm."""

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
"""Those it was checked against; another version keeps its own operations."""

FEWEST_COLUMNS = 16
"""Columns of a product: fewer than 12, and MKL rounds otherwise, so that slots times rank would
show in the results.
"""

TOGETHER = 128
"""Slots times rank up to which one product for all slots costs less than one for each."""

Adapters = Sequence[tuple[torch.Tensor, torch.Tensor, int]]


def install() -> bool:
    """Have vLLM use `GroupedLoRA` in this process, on a CPU and for versions it is known to fit;
    whether it does.
    """
    fits = current_platform.is_cpu() and vllm.__version__.split("+")[0] in VERSIONS
    if fits:
        platform = type(current_platform)
        platform.get_punica_wrapper = classmethod(lambda _: f"{__name__}.{GroupedLoRA.__name__}")
    return fits


class GroupedLoRA(PunicaWrapperCPU):
    """The operations of `PunicaWrapperCPU` on linear layers: one product for all adapters, or one
    each if that is less.

    vLLM's own gather a copy of A and B for every token, and give rows of the base (index -1) the
    last slot's adapter. A row's result is the same to the bit whatever other rows and adapters are
    in the batch, and however many slots the engine has.
    """

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Note which rows of the batch belong to which adapter slot."""
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
        """y += scale * x A^T B^T in place: y `[N, out]`, x `[N, in]`, A `[slots, 1, r, in]`, B
        `[slots, 1, out, r]`.

        q, k and v (gate and up) come packed: one A and one B each, every B for its slice of `out`.
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
        """All slots' products for all rows, those of other slots times zero."""
        missing = fewest_rows() - len(x)
        if missing > 0:
            enough, x, mask = (F.pad(one, (0, 0, 0, missing)) for one in (y, x, mask))
        else:
            enough = y
        parts = enough.split([size for _, _, size in adapters], dim=1)
        for part, (lora_a, lora_b, _) in zip(parts, adapters, strict=True):
            inner = (x @ _enough_rows(lora_a.flatten(0, 2)).T).mul_(mask)
            part.addmm_(
                inner, _enough_rows(lora_b[:, 0].transpose(1, 2).flatten(0, 1)), alpha=scale
            )
        if missing > 0:
            y.copy_(enough[: len(y)])

    def _add_apart(
        self, y: torch.Tensor, x: torch.Tensor, adapters: Adapters, scale: float
    ) -> None:
        """Each slot's products for its own rows."""
        if self._groups is None:
            self._groups = rows_by_slot(self.token_lora_indices)
        for slot, rows in self._groups:
            mine, theirs = (
                (y, x) if rows is None else (y.index_select(0, rows), x.index_select(0, rows))
            )
            parts = mine.split([size for _, _, size in adapters], dim=1)
            for part, (lora_a, lora_b, _) in zip(parts, adapters, strict=True):
                inner = theirs @ _enough_rows(lora_a[slot, 0]).T
                part.addmm_(inner, _enough_rows(lora_b[slot, 0].T), alpha=scale)
            if rows is not None:
                y.index_copy_(0, rows, mine)

    def _mask(self, slots: int, rank: int) -> torch.Tensor:
        """`[N, slots * r or more]`: ones where a row's own adapter stands; none for rows of the
        base.
        """
        if (slots, rank) not in self._masks:
            own = self.token_lora_indices[:, None] == torch.arange(slots)
            missing = max(0, FEWEST_COLUMNS - slots * rank)
            self._masks[slots, rank] = F.pad(
                own.repeat_interleave(rank, dim=1).float(), (0, missing)
            )
        return self._masks[slots, rank]


def _enough_rows(matrix: torch.Tensor) -> torch.Tensor:
    """A or B^T with rows of zeros up to `FEWEST_COLUMNS`."""
    missing = FEWEST_COLUMNS - len(matrix)
    return F.pad(matrix, (0, 0, 0, missing)) if missing > 0 else matrix


def rows_by_slot(slot_N: torch.Tensor) -> list[tuple[int, torch.Tensor | None]]:
    """(slot, its rows) for each adapter in the batch; None stands for all rows; few rows are
    repeated to be enough.
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
