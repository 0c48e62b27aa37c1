"""Checks that the engine serves the trainer's adapter, by the log-probabilities of both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rltrain.engines.base import SyncError

# Every comparison with NaN is False: it has to be looked for.
NOT_FINITE = (
    "log-probabilities are NaN or infinite: the model's weights or activations are no longer finite"
)
PROBE_ROWS = 8
"""Sequences that are computed again with the adapter off: enough to decide, and cheap."""


@dataclass(frozen=True, slots=True)
class SyncGap:
    """Mean absolute differences of the log-probabilities of the same tokens, in nats.

    `engine`: engine against trainer; `largest`: the largest of these; `adapter`: trainer with the
    adapter on against off, None where there is no adapter.
    """

    engine: float
    largest: float
    adapter: float | None


def check_sync(
    engine: torch.Tensor,
    trainer_on: torch.Tensor,
    trainer_off: torch.Tensor | None,
    *,
    tolerance: float,
) -> SyncGap:
    """Compare log-probabilities of the same tokens, each `[N]`, in nats.

    `trainer_off` is the trainer's with the adapter disabled; None for full fine-tuning. Raises
    SyncError for a mean difference above `tolerance`, and for an engine that is nearer to the base
    where the adapter changes more than that.
    """
    others = [trainer_on] if trainer_off is None else [trainer_on, trainer_off]
    if engine.numel() == 0 or any(other.shape != engine.shape for other in others):
        raise ValueError(
            "log-probabilities of the same tokens are required, got "
            f"{[len(x) for x in (engine, *others)]}"
        )
    if not all(torch.isfinite(x).all() for x in (engine, *others)):
        raise SyncError(f"{'trainer' if torch.isfinite(engine).all() else 'engine'}: {NOT_FINITE}")
    difference = (engine - trainer_on).abs()
    gap = SyncGap(
        engine=difference.mean().item(),
        largest=difference.max().item(),
        adapter=None if trainer_off is None else (trainer_on - trainer_off).abs().mean().item(),
    )
    to_base = None if trainer_off is None else (engine - trainer_off).abs().mean().item()
    if (
        gap.adapter is not None
        and to_base is not None
        and gap.adapter > tolerance
        and not gap.engine < to_base
    ):
        raise SyncError(
            "the engine serves the base model, not the adapter: its log-probabilities "
            f"differ by {to_base:.2e} "
            f"from the trainer's without the adapter and by {gap.engine:.2e} from those "
            "with it (mean, nats)"
        )
    if not gap.engine <= tolerance:
        raise SyncError(
            f"the engine does not serve the trainer's weights: mean |log-probability difference| "
            f"{gap.engine:.2e} nats, tolerance {tolerance:.2e} (largest {gap.largest:.2e})"
        )
    return gap


def certain(engine: torch.Tensor, trainer: torch.Tensor, tolerance: float) -> bool:
    """Return whether log-probabilities `[N]` prove by themselves that the engine has the adapter.

    Let adapter and base differ by more than the tolerance, and the engine from the adapter by less
    than half of it. By the triangle inequality the base is then farther from the engine.
    """
    return float((engine - trainer).abs().mean()) < tolerance / 2


def check_gap(mean: float, largest: float, tolerance: float) -> None:
    """Raise SyncError when a batch's mean gap, in nats, is above the tolerance or NaN."""
    if not math.isfinite(mean):
        raise SyncError(NOT_FINITE)
    if mean > tolerance:
        raise SyncError(
            "the engine did not sample from the trainer's weights: mean |log-probability "
            f"difference| {mean:.2e} nats "
            f"over the batch, tolerance {tolerance:.2e} (largest difference {largest:.2e})"
        )
