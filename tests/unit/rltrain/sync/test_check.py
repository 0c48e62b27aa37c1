"""Which log-probabilities prove that the engine samples from the trainer's policy."""

from __future__ import annotations

import math

import pytest
import torch

from rltrain.engines.base import SyncError
from rltrain.sync.check import certain, check_gap, check_sync


def test_gaps_of_both_signs_do_not_cancel() -> None:
    trainer = torch.tensor([-1.0, -2.0])
    assert certain(trainer + 0.04, trainer, tolerance=0.1)
    assert not certain(trainer + torch.tensor([0.06, -0.06]), trainer, tolerance=0.1)
    assert not certain(trainer * math.nan, trainer, tolerance=0.1)


def test_a_mean_gap_above_the_tolerance_is_refused() -> None:
    check_gap(0.1, 5.0, tolerance=0.1)
    with pytest.raises(SyncError, match="did not sample from the trainer's weights"):
        check_gap(0.11, 5.0, tolerance=0.1)


def test_log_probabilities_that_are_no_numbers_are_called_so() -> None:
    with pytest.raises(SyncError, match="NaN or infinite"):
        check_gap(math.nan, math.nan, tolerance=math.inf)
    sound = torch.tensor([-1.0, -2.0])
    with pytest.raises(SyncError, match="trainer: log-probabilities are NaN or infinite"):
        check_sync(sound, sound * math.nan, sound, tolerance=0.1)
    with pytest.raises(SyncError, match="engine: log-probabilities are NaN or infinite"):
        check_sync(sound * math.inf, sound, None, tolerance=0.1)
