"""Losses, importance weights, KL estimators and reductions against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.config.schema import TIS as Correction
from harness.config.schema import KLEstimator, LossReduction, PolicyLoss
from rltrain.algorithms.losses import (
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REDUCTIONS,
    TIS,
    PolicyInputs,
    Totals,
    value_loss,
)
from rltrain.data.batch import Batch
from tests.recipes import quickstart
from tests.unit.rltrain.algorithms.test_trained_model import policy_of

OLD = -0.7  # an old log-probability; cispo's loss depends on the log-probability itself


def test_every_name_of_the_schema_is_registered() -> None:
    assert set(POLICY_LOSSES) == {e.name for e in PolicyLoss}
    assert set(KL_ESTIMATORS) == {e.name for e in KLEstimator}
    assert set(REDUCTIONS) == {e.name for e in LossReduction}
    assert set(TIS) == {e.name for e in Correction} - {"none"}


def _inputs(
    log_ratios: list[list[float]], advantages: list[list[float]], mask: list[list[float]]
) -> PolicyInputs:
    old = torch.full_like(torch.tensor(log_ratios), OLD)
    logprobs = (old + torch.tensor(log_ratios)).requires_grad_()
    return PolicyInputs(logprobs, old, torch.tensor(advantages), torch.tensor(mask), 0.2, 0.3, 3.0)


def _value_and_gradient(
    name: str, inputs: PolicyInputs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, where it is held, and the gradient of its sum; `[B, T]` each."""
    loss, held = POLICY_LOSSES[name](inputs)
    (gradient,) = torch.autograd.grad(loss.sum(), inputs.logprobs_BT)
    return loss.detach(), held, gradient


CLIPPED = [
    # ratio, advantage, loss, held; the ratio may be in [0.8, 1.3]
    (1.0, 2.0, -2.0, False),
    (1.5, 2.0, -1.3 * 2, True),
    (0.5, 2.0, -1.0, False),  # the minimum keeps the unclipped, worse one
    (0.5, -2.0, 0.8 * 2, True),
    (1.5, -2.0, 3.0, False),
    (1.5, 0.0, 0.0, False),
]
UNBOUNDED = [(5.0, -2.0, 10.0, False)]
BOUNDED = [  # by c = 3
    (2.9, -2.0, 2.9 * 2, False),
    (5.0, -2.0, 3 * 2, True),
    (5.0, 2.0, -1.3 * 2, True),
    (5.0, 0.0, 0.0, False),
]
CASES = [(name, *case) for name in ("regular", "dr_grpo", "gspo") for case in CLIPPED + UNBOUNDED]
CASES += [("dual_clip", *case) for case in CLIPPED + BOUNDED]


@pytest.mark.parametrize(("name", "ratio", "advantage", "loss", "held"), CASES)
def test_clipped_surrogates(
    name: str, ratio: float, advantage: float, loss: float, held: bool
) -> None:
    value, clipped, gradient = _value_and_gradient(
        name, _inputs([[math.log(ratio)]], [[advantage]], [[1.0]])
    )
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert clipped.item() is held
    # Where the clip holds there is no gradient; else it is -ratio * advantage.
    assert gradient.item() == pytest.approx(0.0 if held else -ratio * advantage, rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight", "held"),
    [
        (1.0, 1.5, 1.0, False),
        (2.0, 1.5, 1.3, True),
        (2.0, -1.5, 1.3, True),  # the bound does not ask for the advantage's sign
        (0.1, 1.5, 0.1, False),  # there is no lower one
        (2.0, 0.0, 1.3, False),
    ],
)
def test_cispo_bounds_the_weight_and_keeps_the_gradient(
    ratio: float, advantage: float, weight: float, held: bool
) -> None:
    inputs = _inputs([[math.log(ratio)]], [[advantage]], [[1.0]])
    value, clipped, gradient = _value_and_gradient("cispo", inputs)
    assert value.item() == pytest.approx(-weight * advantage * (OLD + math.log(ratio)), rel=1e-5)
    assert gradient.item() == pytest.approx(-weight * advantage, rel=1e-5)
    assert clipped.item() is held


def test_gspo_takes_the_sequences_mean_log_ratio() -> None:
    # Means of 0.1 and 0.3, and of 0.5 and 0.7; the third token of the first sequence is padding.
    log_ratios = [[0.1, 0.3, 9.0], [0.5, 0.6, 0.7]]
    inputs = _inputs(
        log_ratios, [[-1.0, -1.0, 0.0], [2.0, 2.0, 2.0]], [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    )
    loss, held, gradient = _value_and_gradient("gspo", inputs)
    inside = math.exp(0.2)  # within [0.8, 1.3]; exp(0.6) is not
    torch.testing.assert_close(loss, torch.tensor([[inside, inside, 0.0], [-2.6, -2.6, -2.6]]))
    assert held.tolist() == [[False, False, False], [True, True, True]]
    torch.testing.assert_close(gradient, torch.tensor([[inside, inside, 0.0], [0.0, 0.0, 0.0]]))


def test_gspo_clips_sequences_where_regular_clips_tokens() -> None:
    inputs = _inputs([[1.0, -1.0]], [[1.0, 1.0]], [[1.0, 1.0]])  # the ratios' geometric mean is 1
    assert POLICY_LOSSES["gspo"](inputs)[1].tolist() == [[False, False]]
    assert POLICY_LOSSES["regular"](inputs)[1].tolist() == [[True, False]]


@st.composite
def policies(draw: st.DrawFn) -> PolicyInputs:
    """Random log-ratios and token-level advantages of right-padded completions."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    lengths = torch.tensor(draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    mask = (torch.arange(width) < lengths.unsqueeze(1)).float()

    def numbers(low: float, high: float) -> torch.Tensor:
        # A product with a subnormal number can round to zero.
        normal = st.floats(low, high, width=32, allow_subnormal=False)
        listed = st.lists(normal, min_size=rows * width, max_size=rows * width)
        return torch.tensor(draw(listed)).view(rows, width)

    old, advantages = numbers(-8, -0.125), numbers(-4, 4) * mask
    return PolicyInputs(
        (old + numbers(-2, 2)).requires_grad_(), old, advantages, mask, 0.2, 0.3, 3.0
    )


@given(
    policies(),
    st.sampled_from(sorted(POLICY_LOSSES)),
    st.sampled_from([math.nan, math.inf, -1e30, 1e4]),
)
@settings(max_examples=150, deadline=None)
def test_padding_has_neither_loss_nor_gradient(
    inputs: PolicyInputs, name: str, garbage: float
) -> None:
    real = inputs.mask_BT > 0
    dirty = replace(
        inputs,
        logprobs_BT=torch.where(real, inputs.logprobs_BT.detach(), garbage).requires_grad_(),
        old_BT=torch.where(real, inputs.old_BT, -1.0),
        advantages_BT=torch.where(real, inputs.advantages_BT, garbage),
    )
    clean = _value_and_gradient(name, inputs)
    for found, expected in zip(_value_and_gradient(name, dirty), clean, strict=True):
        assert torch.equal(found, expected)
        assert not found[~real].any()


@given(policies(), st.sampled_from(sorted(POLICY_LOSSES)))
@settings(max_examples=100, deadline=None)
def test_a_step_never_goes_against_the_advantage(inputs: PolicyInputs, name: str) -> None:
    _, held, gradient = _value_and_gradient(name, inputs)
    assert (-gradient * inputs.advantages_BT >= 0).all()
    if name == "cispo":
        return
    assert not gradient[held].any()
    assert ((gradient != 0) | held | (inputs.advantages_BT == 0)).all()


@given(policies(), st.sampled_from(sorted(POLICY_LOSSES)))
@settings(max_examples=60, deadline=None)
def test_on_policy_every_loss_is_the_policy_gradient(inputs: PolicyInputs, name: str) -> None:
    fresh = replace(inputs, logprobs_BT=inputs.old_BT.clone().requires_grad_())
    _, held, gradient = _value_and_gradient(name, fresh)
    assert not held.any()
    torch.testing.assert_close(gradient, -inputs.advantages_BT)


@given(policies())
@settings(max_examples=100, deadline=None)
def test_dual_clip_bounds_the_loss_of_negative_advantages_alone(inputs: PolicyInputs) -> None:
    inputs = replace(inputs, clip_c=1.5)
    (bounded, _), (free, _) = POLICY_LOSSES["dual_clip"](inputs), POLICY_LOSSES["regular"](inputs)
    negative = inputs.advantages_BT < 0
    assert (bounded <= -1.5 * inputs.advantages_BT)[negative].all()
    assert torch.equal(bounded[~negative], free[~negative])
    inside = free < -1.5 * inputs.advantages_BT
    assert torch.equal(bounded[negative & inside], free[negative & inside])


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "held"),
    [
        # The old value is 1, and the new one may be in [0.8, 1.2].
        (1.1, 3.0, 0.5 * 1.9**2, -1.9, False),
        (
            2.0,
            3.0,
            0.5 * 1.8**2,
            0.0,
            True,
        ),  # 2 goes towards 3, but further than it may: 1.2 counts
        (2.0, 0.0, 0.5 * 2.0**2, 2.0, False),  # away from the target: the worse one, unclipped
        (0.5, 0.0, 0.5 * 0.8**2, 0.0, True),
        (2.0, 1.4, 0.5 * 0.6**2, 0.6, False),  # past the target: the way back is free
    ],
)
def test_value_loss(value: float, target: float, loss: float, gradient: float, held: bool) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    found, clipped = value_loss(values, torch.ones(1, 1), torch.tensor([[target]]), 0.2)
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert clipped.item() is held
    found.sum().backward()
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_value_loss_within_the_clip_is_half_the_square() -> None:
    generator = torch.Generator().manual_seed(0)
    old, targets = torch.randn(2, 10, 100, generator=generator)
    values = old + 0.19 * (2 * torch.rand(10, 100, generator=generator) - 1)
    loss, held = value_loss(values, old, targets, 0.2)
    torch.testing.assert_close(loss, 0.5 * (values - targets) ** 2)
    assert not held.any()  # though old + (value - old) need not be value to the last bit


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("token", [[1.5, 2.0, 0.5], [0.5, 0.5, 0.0]]),
        ("sequence", [[2.0, 2.0, 2.0], [0.25, 0.25, 0.0]]),  # 1.5 * 4 * 0.5 = 3, and 0.5 * 0.5
    ],
)
def test_truncated_importance_weights(name: str, weights: list[list[float]]) -> None:
    engine = torch.tensor([[-2.0, -3.0, -1.0], [-1.0, -1.0, 0.0]])
    ratios = torch.tensor([[1.5, 4.0, 0.5], [0.5, 0.5, math.nan]])  # the last one is padding
    old = (engine + ratios.log()).requires_grad_()
    found = TIS[name](old, engine, torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]), 2.0)
    torch.testing.assert_close(found, torch.tensor(weights))
    assert not found.requires_grad


@pytest.mark.parametrize("name", sorted(TIS))
def test_importance_weights_are_one_where_engine_and_trainer_agree_and_finite_where_they_never_met(
    name: str,
) -> None:
    logprobs, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2)
    assert torch.equal(TIS[name](logprobs, logprobs, mask, 2.0), torch.ones(1, 2))
    assert torch.equal(TIS[name](logprobs, logprobs - 1000, mask, 2.0), torch.full((1, 2), 2.0))


@pytest.mark.parametrize(
    ("name", "value"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5), ("abs", 0.5)]
)
def test_kl_estimators(name: str, value: float) -> None:
    found = KL_ESTIMATORS[name](torch.tensor([-1.0]), torch.tensor([-0.5]))
    assert found.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "unbiased"), [("k1", True), ("k3", True), ("k2", False), ("abs", False)]
)
def test_bias_of_the_kl_estimators(name: str, unbiased: bool) -> None:
    """Averaged over the policy's own samples, k1 and k3 are the divergence."""
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    divergence = (policy * (policy / reference).log()).sum().item()
    mean = (policy * KL_ESTIMATORS[name](policy.log(), reference.log())).sum().item()
    assert (mean == pytest.approx(divergence, rel=1e-5)) is unbiased


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_mean", 10 / 4),
        ("sequence_mean", (2.0 + 4.0) / 2),
        ("seq_mean_token_sum_norm", 10 / (8 * 2)),
    ],
)
def test_reductions(name: str, value: float) -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    totals = Totals(tokens=4, sequences=2, max_length=8)
    assert REDUCTIONS[name](values, mask, totals).item() == pytest.approx(value)
    # Micro-batches only add up.
    parts = sum(
        REDUCTIONS[name](values[i : i + 1], mask[i : i + 1], totals).item() for i in range(2)
    )
    assert parts == pytest.approx(value)


def _batch() -> Batch:
    """Two completions of two and one tokens; the engine found the first token half as probable."""
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    return Batch(
        prompt_ids=torch.zeros(2, 1, dtype=torch.long),
        prompt_mask=torch.ones(2, 1, dtype=torch.long),
        completion_ids=torch.zeros(2, 2, dtype=torch.long),
        mask=mask,
        loss_mask=mask.clone(),
        engine_logprobs=torch.tensor([[-math.log(2), 0.0], [0.0, 0.0]]),
        old_logprobs=torch.zeros(2, 2),
        ref_logprobs=torch.full((2, 2), -0.5),
        advantages=torch.tensor([[1.0, 1.0], [-1.0, 0.0]]),
    )


def _objective(*overrides: str) -> tuple[float, dict[str, float]]:
    """The loss of `_batch` on the policy that sampled it, and its statistics."""
    keys = [f"trainer.algorithm.{override}" for override in overrides]
    policy, batch = policy_of(quickstart(keys)), _batch()
    loss, stats = policy.objective(torch.zeros(2, 2), batch, policy.totals(batch))
    return loss.item(), {name: float(value) for name, value in stats.items()}


def test_objective_adds_the_kl_term() -> None:
    loss, stats = _objective("use_kl_loss=true", "kl_loss_coef=0.1", "kl_estimator=k1")
    # Policy: (-1 -1 +1) / 3; KL: 0.5 at each of 3 tokens.
    assert loss == pytest.approx(-1 / 3 + 0.1 * 0.5, rel=1e-5)
    assert stats["kl"] == pytest.approx(0.5)
    assert stats["clip_ratio/region_mean"] == 0


def test_objective_without_kl_loss_has_no_kl() -> None:
    loss, stats = _objective("use_kl_loss=false")
    assert loss == pytest.approx(-1 / 3, rel=1e-5)
    assert "kl" not in stats


@pytest.mark.parametrize(("cap", "weight"), [(2.5, 2.0), (1.5, 1.5)])
@pytest.mark.parametrize(("tis", "reached"), [("token", 1), ("sequence", 2)])
def test_objective_weighs_what_the_engine_thought_less_probable(
    tis: str, reached: int, cap: float, weight: float
) -> None:
    loss, _ = _objective(f"tis={tis}", f"tis_imp_ratio_cap={cap}")
    # The weight stands on the first token, or on both of its sequence.
    assert loss == pytest.approx((-weight * reached - (2 - reached) + 1) / 3, rel=1e-5)


def test_dr_grpo_brings_its_own_reduction() -> None:
    loss, _ = _objective("policy_loss_type=dr_grpo", "loss_reduction=token_mean")
    length = quickstart().generator.sampling_params.max_generate_length
    assert loss == pytest.approx((-1 - 1 + 1) / (2 * length), rel=1e-5)
