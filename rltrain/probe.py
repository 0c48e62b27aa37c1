"""The sync proof on real samples: the engine drew them from the trainer's policy, adapter on, and not from the base."""

from __future__ import annotations

import torch

from rltrain.batch import Batch
from rltrain.model import adapter_off, token_logprobs
from rltrain.pack import Member, Pack
from rltrain.rollout import Rollout
from rltrain.sync.proof import SyncError, SyncGap, check_sync

# Sequences whose log-probabilities are computed again with the adapter off: enough to tell, too few to cost.
PROBE_ROWS = 8


@torch.no_grad()
def prove_sync(pack: Pack, member: Member, batch: Batch, temperature: float) -> SyncGap:
    """The gap between engine and trainer over a batch's first sequences; raises SyncError when it is too wide."""
    probe = batch.rows(0, PROBE_ROWS)
    real = probe.mask.bool()
    on = token_logprobs(pack.model, probe, temperature)[real]
    off = None
    if member.recipe.trainer.policy.model.lora.rank > 0:
        with adapter_off(pack.model):
            off = token_logprobs(pack.model, probe, temperature)[real]
    return check_sync(probe.engine_logprobs[real], on, off, tolerance=member.sync_tolerance)


def prove_evaluation(pack: Pack, scored: Rollout) -> SyncGap:
    """The same proof on the first samples of an evaluation: the last sync is followed by no training rollout."""
    pack.activate(scored.member)
    temperature = scored.member.recipe.generator.eval_sampling_params.temperature
    return prove_sync(pack, scored.member, scored.batch(pack), temperature)


def check_gap(mean: float, largest: float, tolerance: float) -> None:
    """The same bound over all of a batch; raises SyncError when the mean gap (nats) is above it."""
    if not mean <= tolerance:
        raise SyncError(
            f"the engine did not sample from the trainer's weights: mean |log-probability difference| {mean:.2e} nats "
            f"over the batch, tolerance {tolerance:.2e} (largest difference {largest:.2e})"
        )
