"""Token rewards, whitening and advantage estimators: by hand, and by what must hold whatever the
numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, pstdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config.schema import AdvantageEstimator
from rltrain.algorithms.advantages import (
    ADVANTAGES,
    AdvantageInputs,
    gae,
    gae_returns,
    grpo,
    rloo,
    token_rewards,
    whiten,
)

TWO_AND_THREE = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


def _scored(scores: list[float], group: int, norm_by_std: bool = True) -> AdvantageInputs:
    """Samples of two tokens each whose last token carries the score."""
    rewards = torch.tensor([[0.0, score] for score in scores])
    return AdvantageInputs(rewards, torch.ones_like(rewards), group, None, 1.0, 1.0, norm_by_std)


@st.composite
def batches(draw: st.DrawFn) -> AdvantageInputs:
    """Random rewards and values of P groups of G right-padded completions; some completions are
    empty.
    """
    groups, group, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rows = groups * group
    lengths = torch.tensor(draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    numbers = st.lists(st.floats(-10, 10, width=32), min_size=rows * width, max_size=rows * width)
    mask = (torch.arange(width) < lengths.unsqueeze(1)).float()
    rewards, values = (torch.tensor(draw(numbers)).view(rows, width) * mask for _ in range(2))
    gamma, lambd = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    return AdvantageInputs(rewards, mask, group, values, gamma, lambd, draw(st.booleans()))


def test_every_estimator_of_the_schema_is_registered() -> None:
    assert set(ADVANTAGES) == {e.name for e in AdvantageEstimator}


def test_the_score_stands_on_the_last_token_and_kl_on_every_one() -> None:
    kl = torch.tensor(
        [[0.5, 1.0, math.nan], [0.0, 2.0, 3.0]]
    )  # not a number: padding is never looked at
    found = token_rewards(torch.tensor([1.0, -1.0]), TWO_AND_THREE, kl, coef=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 1 - 0.1, 0.0], [0.0, -0.2, -1 - 0.3]]))
    plain = token_rewards(torch.tensor([1.0, -1.0]), TWO_AND_THREE, None, coef=0.1)
    assert torch.equal(plain, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0]]))


def test_a_row_without_tokens_has_no_reward() -> None:
    mask = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert torch.equal(
        token_rewards(torch.tensor([7.0, 2.0]), mask, None, 0.0),
        torch.tensor([[0.0, 0.0], [2.0, 0.0]]),
    )


def test_whitening_by_hand() -> None:
    # 1, 2, 3: mean 2, variance (1 + 0 + 1) / 3.
    found = whiten(
        torch.tensor([[1.0, math.inf], [2.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    )
    side = 1 / math.sqrt(2 / 3)
    torch.testing.assert_close(found, torch.tensor([[-side, 0.0], [0.0, side]]), atol=1e-5, rtol=0)


def test_whitening_without_spread_or_tokens_gives_zeros() -> None:
    assert torch.equal(whiten(torch.full((1, 7), 0.1), torch.ones(1, 7)), torch.zeros(1, 7))
    assert torch.equal(whiten(torch.full((1, 7), math.nan), torch.zeros(1, 7)), torch.zeros(1, 7))


def test_grpo_is_the_groups_z_score() -> None:
    # Mean 0.25, unbiased variance (3 * 0.0625 + 0.5625) / 3 = 0.25: std 0.5.
    found = grpo(_scored([0.0, 0.0, 0.0, 1.0], group=4))
    assert torch.allclose(
        found, torch.tensor([-0.5, -0.5, -0.5, 1.5]).unsqueeze(1).expand(4, 2), atol=1e-5
    )


def test_grpo_without_std_only_takes_the_mean_off() -> None:
    found = grpo(_scored([0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 4.0, 8.0], group=4, norm_by_std=False))
    centred = torch.tensor([-0.25, -0.25, -0.25, 0.75, 2 - 4.0, 2 - 4.0, 4 - 4.0, 8 - 4.0])
    assert torch.equal(found, centred.unsqueeze(1).expand(8, 2))


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_grpo_gives_no_signal_where_there_is_none(norm_by_std: bool) -> None:
    # Tenths are no binary numbers: rounding in the mean must not be divided by itself.
    equal = _scored([0.1] * 7 + [0.3] * 7, group=7, norm_by_std=norm_by_std)
    assert torch.equal(grpo(equal), torch.zeros(14, 2))
    alone = _scored([1.0, 0.0, 0.7], group=1, norm_by_std=norm_by_std)
    assert torch.equal(grpo(alone), torch.zeros(3, 2))


def test_rloo_leaves_each_sample_out_of_its_baseline() -> None:
    found = rloo(_scored([1.0, 2.0, 6.0], group=3))
    others = torch.tensor([1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2])  # -3, -1.5, 4.5
    torch.testing.assert_close(found, others.unsqueeze(1).expand(3, 2))
    assert torch.equal(rloo(_scored([1.0, 6.0], group=1)), torch.zeros(2, 2))


def test_a_groups_score_is_the_sum_of_token_rewards() -> None:
    rewards = torch.tensor([[0.5, 0.25, 99.0], [1.0, 1.0, 1.0]])  # 0.75 and 3; the 99 is padding
    found = rloo(AdvantageInputs(rewards, TWO_AND_THREE, 2, None, 1.0, 1.0, True))
    assert torch.equal(found, torch.tensor([[-2.25, -2.25, 0.0], [2.25, 2.25, 2.25]]))


def test_reinforce_plus_plus_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    found = ADVANTAGES["reinforce++"](
        AdvantageInputs(rewards, TWO_AND_THREE, 1, None, 0.5, 1.0, True)
    )
    # To go: 0.5, 1 and 0.5, 1, 2: mean 1, variance (0.25 + 0 + 0.25 + 0 + 1) / 5.
    half = 0.5 / math.sqrt(0.3)
    expected = torch.tensor([[-half, 0.0, 0.0], [-half, 0.0, 2 * half]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.6]])
    returns = AdvantageInputs(
        rewards, torch.ones(1, 3), 1, values, gamma=0.9, lambd=0.5, norm_by_std=True
    )
    # delta: 0.9 * 0.4 - 0.5 = -0.14, 0.9 * 0.6 - 0.4 = 0.14, 1 - 0.6 = 0.4; each plus 0.9 * 0.5
    # times the next.
    raw = [-0.14 + 0.45 * 0.32, 0.14 + 0.45 * 0.4, 0.4]
    torch.testing.assert_close(
        gae_returns(returns), torch.tensor([[0.5 + raw[0], 0.4 + raw[1], 1.0]])
    )
    whitened = [(a - fmean(raw)) / pstdev(raw) for a in raw]
    torch.testing.assert_close(gae(returns), torch.tensor([whitened]), atol=1e-5, rtol=0)


def test_gae_at_lambda_one_aims_at_the_rewards_to_go() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[9.0, -3.0, 5.0]])
    targets = gae_returns(
        AdvantageInputs(
            rewards, torch.ones(1, 3), 1, values, gamma=0.5, lambd=1.0, norm_by_std=True
        )
    )
    torch.testing.assert_close(targets, torch.tensor([[1 + 1 + 1.0, 2 + 2.0, 4.0]]))
    # At lambda 0 it is the reward plus the discounted next value.
    near = gae_returns(
        AdvantageInputs(
            rewards, torch.ones(1, 3), 1, values, gamma=0.5, lambd=0.0, norm_by_std=True
        )
    )
    torch.testing.assert_close(near, torch.tensor([[1 - 1.5, 2 + 2.5, 4.0]]))


@given(batches())
@settings(max_examples=60, deadline=None)
def test_gae_is_the_discounted_sum_of_residuals(returns: AdvantageInputs) -> None:
    assert returns.values_BT is not None
    targets = gae_returns(returns)
    for row, length in enumerate(returns.mask_BT.sum(dim=1).long().tolist()):
        reward, value = (
            returns.rewards_BT[row].tolist(),
            [*returns.values_BT[row, :length].tolist(), 0.0],
        )
        delta = [reward[t] + returns.gamma * value[t + 1] - value[t] for t in range(length)]
        decay = returns.gamma * returns.lambd
        for t in range(length):
            advantage = sum(decay**step * delta[t + step] for step in range(length - t))
            assert targets[row, t].item() == pytest.approx(advantage + value[t], abs=1e-4)


@given(batches(), st.sampled_from(sorted(ADVANTAGES)), st.sampled_from([math.nan, math.inf, 1e30]))
@settings(max_examples=120, deadline=None)
def test_padding_changes_nothing(returns: AdvantageInputs, name: str, garbage: float) -> None:
    assert returns.values_BT is not None
    real = returns.mask_BT > 0
    dirty = replace(
        returns,
        rewards_BT=torch.where(real, returns.rewards_BT, garbage),
        values_BT=torch.where(real, returns.values_BT, garbage),
    )
    clean = ADVANTAGES[name](returns)
    assert torch.equal(ADVANTAGES[name](dirty), clean)
    assert torch.equal(gae_returns(dirty), gae_returns(returns))
    assert torch.isfinite(clean).all()
    assert not clean[~real].any()


@given(batches(), st.sampled_from(sorted(ADVANTAGES)))
@settings(max_examples=60, deadline=None)
def test_a_gap_in_a_completion_is_as_if_it_were_not_there(
    returns: AdvantageInputs, name: str
) -> None:
    """Tokens that are not the policy's own may stand between those that are."""
    assert returns.values_BT is not None

    def spread(tensor: torch.Tensor, filler: float) -> torch.Tensor:
        return torch.stack([tensor, torch.full_like(tensor, filler)], dim=2).flatten(1)

    gapped = replace(
        returns,
        rewards_BT=spread(returns.rewards_BT, 5.0),
        mask_BT=spread(returns.mask_BT, 0.0),
        values_BT=spread(returns.values_BT, 5.0),
    )
    torch.testing.assert_close(
        ADVANTAGES[name](gapped)[:, ::2], ADVANTAGES[name](returns), atol=1e-5, rtol=1e-5
    )


@given(batches())
@settings(max_examples=60, deadline=None)
def test_group_advantages_add_up_to_zero_and_forget_a_shift(returns: AdvantageInputs) -> None:
    mask = torch.ones_like(returns.mask_BT)
    shifted = replace(returns, mask_BT=mask, rewards_BT=returns.rewards_BT + 3)
    for estimate in (grpo, rloo):
        found = estimate(replace(returns, mask_BT=mask))
        sums = found[:, 0].view(-1, returns.group).sum(dim=1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-3, rtol=0)
        if estimate is rloo or not returns.norm_by_std:
            torch.testing.assert_close(estimate(shifted), found, atol=1e-3, rtol=1e-4)


@given(batches())
@settings(max_examples=60, deadline=None)
def test_whitened_numbers_have_mean_zero_and_deviation_one(returns: AdvantageInputs) -> None:
    real = returns.mask_BT > 0
    before = returns.rewards_BT[real]
    after = whiten(returns.rewards_BT, returns.mask_BT)[real]
    # Well above the epsilon that keeps the deviation from being zero.
    if len(before) and before.std(correction=0) > 0.01:
        assert after.mean().item() == pytest.approx(0, abs=1e-4)
        assert after.std(correction=0).item() == pytest.approx(1, abs=1e-3)
        assert (after[before.argsort()].diff() >= 0).all()  # the order stays
