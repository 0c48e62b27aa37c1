"""The proof that a sync arrived: the engine's log-probabilities are the trainer's, not the
base's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rltrain.engines.base import SyncError

# What a comparison with NaN says nothing about.
NOT_FINITE = (
    "log-probabilities are NaN or infinite: the model's weights or activations "
    "are no finite numbers any more"
)


@dataclass(frozen=True, slots=True)
class SyncGap:
    """Mean absolute differences of log-probabilities (nats) over one probe batch's completion
    tokens.

    `engine`: engine against trainer; `largest`: its greatest; `adapter`: trainer with the adapter
    on against off, None where there is no adapter.
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
    """Compare log-probabilities of the same tokens, each `[N]`, and raise SyncError for an engine
    out of step.

    `trainer_off` is the trainer's with the adapter disabled; None for full fine-tuning. Out of step
    is a mean difference above `tolerance` (nats), or, where the adapter changes more than that, an
    engine nearer to the base.
    """
    others = [trainer_on] if trainer_off is None else [trainer_on, trainer_off]
    if engine.numel() == 0 or any(other.shape != engine.shape for other in others):
        raise ValueError(
            "log-probabilities of the same tokens are wanted, got "
            f"{[len(x) for x in (engine, *others)]}"
        )
    if not all(torch.isfinite(one).all() for one in (engine, *others)):
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
