"""Advantages, losses, KL estimators and reductions against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from harness import recipe as recipes
from harness.schema import AdvantageEstimator, KLEstimator, LossReduction, PolicyLoss
from rltrain.advantages import ADVANTAGES, grpo
from rltrain.batch import Batch
from rltrain.losses import KL_ESTIMATORS, POLICY_LOSSES, REDUCTIONS, Totals, regular
from rltrain.objective import Objective


def test_every_name_of_the_schema_is_registered() -> None:
    assert set(ADVANTAGES) == {e.name for e in AdvantageEstimator}
    assert set(POLICY_LOSSES) == {e.name for e in PolicyLoss}
    assert set(KL_ESTIMATORS) == {e.name for e in KLEstimator}
    assert set(REDUCTIONS) == {e.name for e in LossReduction}


def test_grpo_is_the_groups_z_score() -> None:
    # Mean 0.25, unbiased variance (3 * 0.0625 + 0.5625) / 3 = 0.25: std 0.5.
    advantages = grpo(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert torch.allclose(advantages, torch.tensor([[-0.5, -0.5, -0.5, 1.5]]), atol=1e-5)


def test_grpo_gives_no_signal_where_there_is_none() -> None:
    assert torch.equal(grpo(torch.tensor([[1.0, 1.0], [0.3, 0.3]])), torch.zeros(2, 2))
    assert torch.equal(grpo(torch.tensor([[1.0], [0.0]])), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "held"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # clipped at 1.2
        (0.5, 2.0, -1.0, False),  # the minimum keeps the unclipped, worse one
        (0.5, -2.0, 1.6, True),  # clipped at 0.8
        (1.5, -2.0, 3.0, False),
    ],
)
def test_clipped_surrogate(ratio: float, advantage: float, loss: float, held: bool) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    value, clipped = regular(logprobs, torch.zeros(1, 1), torch.tensor([advantage]), 0.2, 0.2)
    assert value.item() == pytest.approx(loss, rel=1e-6)
    assert clipped.item() is held
    value.sum().backward()
    # Where the clip holds there is no gradient; else it is -ratio * advantage.
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0.0 if held else -ratio * advantage, rel=1e-6)


@pytest.mark.parametrize(("name", "value"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5), ("abs", 0.5)])
def test_kl_estimators(name: str, value: float) -> None:
    found = KL_ESTIMATORS[name](torch.tensor([-1.0]), torch.tensor([-0.5]))
    assert found.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("token_mean", 10 / 4), ("sequence_mean", (2.0 + 4.0) / 2), ("seq_mean_token_sum_norm", 10 / (8 * 2))],
)
def test_reductions(name: str, value: float) -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    totals = Totals(tokens=4, sequences=2, max_length=8)
    assert REDUCTIONS[name](values, mask, totals).item() == pytest.approx(value)
    # Micro-batches only add up.
    parts = sum(REDUCTIONS[name](values[i : i + 1], mask[i : i + 1], totals).item() for i in range(2))
    assert parts == pytest.approx(value)


def _batch() -> Batch:
    return Batch(
        prompt_ids=torch.zeros(2, 1, dtype=torch.long), prompt_mask=torch.ones(2, 1, dtype=torch.long),
        completion_ids=torch.zeros(2, 2, dtype=torch.long), mask=torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        engine_logprobs=torch.zeros(2, 2), advantages=torch.tensor([1.0, -1.0]), old_logprobs=torch.zeros(2, 2),
        ref_logprobs=torch.full((2, 2), -0.5),
    )  # fmt: skip


def test_objective_adds_the_kl_term() -> None:
    recipe = recipes.load(
        "quickstart",
        [
            "trainer.algorithm.use_kl_loss=true",
            "trainer.algorithm.kl_loss_coef=0.1",
            "trainer.algorithm.kl_estimator=k1",
        ],
    )
    objective, batch = Objective(recipe), _batch()
    loss, stats = objective(torch.zeros(2, 2), batch, objective.totals(batch))
    # Policy: (-1 -1 +1) / 3; KL: 0.5 at each of 3 tokens.
    assert loss.item() == pytest.approx(-1 / 3 + 0.1 * 0.5, rel=1e-5)
    assert stats["kl"] == pytest.approx(0.5)
    assert stats["clip_ratio/region_mean"] == 0


def test_objective_without_reference_has_no_kl() -> None:
    objective, batch = Objective(recipes.load("quickstart")), _batch()
    batch.ref_logprobs = None
    loss, stats = objective(torch.zeros(2, 2), batch, objective.totals(batch))
    assert loss.item() == pytest.approx(-1 / 3, rel=1e-5)
    assert "kl" not in stats
