"""What an evaluation makes of its rewards."""

from __future__ import annotations

import pytest
import torch

from rltrain.evaluate import _accuracy


def test_pass_at_n_asks_for_one_right_answer_among_n() -> None:
    # Three problems: both samples right, one of two, none, where half a reward is not right.
    metrics = _accuracy(torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 0.0]]))
    assert metrics == {
        "eval/accuracy": pytest.approx(3.5 / 6),
        "eval/mean@2": pytest.approx(3.5 / 6),
        "eval/pass@2": pytest.approx(2 / 3),
    }


def test_with_one_sample_a_problem_there_is_accuracy_alone() -> None:
    assert _accuracy(torch.tensor([[1.0], [0.0]])) == {"eval/accuracy": 0.5}
