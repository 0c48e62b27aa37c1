"""The sync proof on real samples: the engine drew them from the trainer's policy, adapter on, and not from the base."""

from __future__ import annotations

from typing import Any

import torch

from rltrain.batch import Batch
from rltrain.logprobs import token_logprobs
from rltrain.model import adapter_off
from rltrain.sync.proof import SyncError, SyncGap, check_sync

# Sequences whose log-probabilities are computed again with the adapter off: enough to tell, too few to cost.
PROBE_ROWS = 8


@torch.no_grad()
def prove_sync(model: Any, batch: Batch, temperature: float, *, tolerance: float, adapter: bool) -> SyncGap:
    """The gap between engine and trainer over a batch's first sequences; raises SyncError when it is too wide.

    `adapter`: whether there is one to switch off, so that an engine which serves the base can be told.
    """
    probe = batch.take(range(min(PROBE_ROWS, len(batch))))
    real = probe.mask.bool()
    on = token_logprobs(model, probe, temperature)[real]
    off = None
    if adapter and not certain(probe.engine_logprobs[real], on, tolerance):
        with adapter_off(model):
            off = token_logprobs(model, probe, temperature)[real]
    return check_sync(probe.engine_logprobs[real], on, off, tolerance=tolerance)


def certain(engine: torch.Tensor, trainer: torch.Tensor, tolerance: float) -> bool:
    """Whether log-probabilities `[N]` are so alike that the engine must be nearer to the adapter than to the base.

    Where those two differ by more than the tolerance, and the engine from the adapter by less than half of it, the base
    is farther off than that, by the triangle inequality.
    """
    return float((engine - trainer).abs().mean()) < tolerance / 2


def check_gap(mean: float, largest: float, tolerance: float) -> None:
    """The same bound over all of a batch; raises SyncError when the mean gap (nats) is above it."""
    if not mean <= tolerance:
        raise SyncError(
            f"the engine did not sample from the trainer's weights: mean |log-probability difference| {mean:.2e} nats "
            f"over the batch, tolerance {tolerance:.2e} (largest difference {largest:.2e})"
        )
