"""The sync proof on real samples: the engine drew them from the trainer's policy, adapter on, and not from the base."""

from __future__ import annotations

import torch

from rltrain.batch import Batch
from rltrain.model import adapter_off, token_logprobs
from rltrain.pack import Member, Pack
from rltrain.rollout import Rollout
from rltrain.sync.proof import SyncGap, check_sync

# Sequences whose log-probabilities are computed again with the adapter off: enough to tell, too few to cost.
PROBE_ROWS = 8

DEFAULT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@torch.no_grad()
def prove_sync(pack: Pack, member: Member, batch: Batch, temperature: float) -> SyncGap:
    """The gap between engine and trainer over a batch with `old_logprobs`; raises SyncError when it is too wide."""
    assert batch.old_logprobs is not None
    tolerance = member.recipe.trainer.sync_tolerance or DEFAULT_TOLERANCE[pack.model.dtype]
    if member.recipe.trainer.policy.model.lora.rank > 0:
        probe = batch.rows(0, PROBE_ROWS)
        assert probe.old_logprobs is not None
        with adapter_off(pack.model):
            off = token_logprobs(pack.model, probe, temperature)[0]
        real = probe.mask.bool()
        check_sync(probe.engine_logprobs[real], probe.old_logprobs[real], off[real], tolerance=tolerance)
    real = batch.mask.bool()
    return check_sync(batch.engine_logprobs[real], batch.old_logprobs[real], None, tolerance=tolerance)


@torch.no_grad()
def prove_evaluation(pack: Pack, scored: Rollout) -> SyncGap:
    """The same proof on the first samples of an evaluation: the last sync is followed by no training rollout."""
    member = scored.member
    temperature = member.recipe.generator.eval_sampling_params.temperature
    batch = scored.batch(pack).rows(0, PROBE_ROWS)
    pack.activate(member)
    batch.old_logprobs = token_logprobs(pack.model, batch, temperature)[0]
    return prove_sync(pack, member, batch, temperature)
