"""The sync proof on real samples: the engine drew them from the trainer's policy, adapter on, and
not from the base.
"""

from __future__ import annotations

import math

import torch

from rltrain.engines.base import SyncError
from rltrain.sync.check import NOT_FINITE

# Sequences whose log-probabilities are computed again with the adapter off: enough to tell, too few
# to cost.
PROBE_ROWS = 8


def certain(engine: torch.Tensor, trainer: torch.Tensor, tolerance: float) -> bool:
    """Whether log-probabilities `[N]` are so alike that the engine must be nearer to the adapter
    than to the base.

    Where those two differ by more than the tolerance, and the engine from the adapter by less than
    half of it, the base is farther off than that, by the triangle inequality.
    """
    return float((engine - trainer).abs().mean()) < tolerance / 2


def check_gap(mean: float, largest: float, tolerance: float) -> None:
    """The same bound over all of a batch; raises SyncError when the mean gap (nats) is above it."""
    if not math.isfinite(mean):
        raise SyncError(NOT_FINITE)
    if mean > tolerance:
        raise SyncError(
            "the engine did not sample from the trainer's weights: mean |log-probability "
            f"difference| {mean:.2e} nats "
            f"over the batch, tolerance {tolerance:.2e} (largest difference {largest:.2e})"
        )
