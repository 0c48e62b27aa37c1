"""Loss masks, advantages and returns under every setting, on one batch worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rltrain.algorithms.advantages import compute_advantages
from rltrain.data.batch import Batch, collate
from tests.recipes import quickstart

NO_EQUAL, NO_CUT = (
    "trainer.algorithm.zero_variance_filter=true",
    "generator.apply_overlong_filtering=true",
)
KL_IN_REWARD = [
    "trainer.algorithm.use_kl_in_reward=true",
    "trainer.algorithm.advantage_estimator=rloo",
]
GAE = "trainer.algorithm.advantage_estimator=gae"


def _batch(lengths: list[int], values: list[list[float]] | None = None) -> Batch:
    """Completions of these lengths; the policy finds each token less probable than the reference by
    half a nat.
    """
    tokens = [[1] * length for length in lengths]
    logprobs = [[-1.5] * length for length in lengths]
    batch = collate([[5]] * len(lengths), tokens, logprobs, pad_id=0)
    batch.old_logprobs, batch.ref_logprobs = -1.5 * batch.mask, -1.0 * batch.mask
    batch.values = None if values is None else torch.tensor(values)
    return batch


def _computed(
    overrides: list[str], batch: Batch, rewards: list[list[float]], cut: list[bool] | None = None
) -> dict[str, float]:
    """Compute advantages under quickstart's settings with overrides; the metrics."""
    truncated_B = torch.tensor(cut or [False] * len(batch))
    return compute_advantages(quickstart(overrides), batch, torch.tensor(rewards), truncated_B)


@pytest.mark.parametrize(
    ("estimator", "advantages"),
    [
        (
            "grpo",
            [[math.sqrt(0.5), math.sqrt(0.5)], [-math.sqrt(0.5), 0.0]],
        ),  # 0.5 over the unbiased std of 1 and 0
        ("rloo", [[1.0, 1.0], [-1.0, 0.0]]),
        # To go, with gamma 0.5: 0.5, 1 and 0; mean 0.5, variance 0.5 / 3.
        ("reinforce++", [[0.0, math.sqrt(1.5)], [-math.sqrt(1.5), 0.0]]),
        # Residuals 0 and 0.5, then -0.25; with lambda 0 they are it: mean 1/12, variance (1/16 +
        # 1/4) / 3 - 1/144.
        ("gae", [[-0.267261, 1.336306], [-1.069045, 0.0]]),
    ],
)
def test_each_estimator_has_its_advantages(estimator: str, advantages: list[list[float]]) -> None:
    batch = _batch([2, 1], values=[[0.25, 0.5], [0.25, 0.0]])
    settings = ["gamma=0.5", "lambd=0", f"advantage_estimator={estimator}"]
    _computed([f"trainer.algorithm.{setting}" for setting in settings], batch, [[1.0, 0.0]])
    assert batch.advantages is not None
    torch.testing.assert_close(batch.advantages, torch.tensor(advantages), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("setting", "size"),
    [
        ("grpo_norm_by_std=true", math.sqrt(0.5)),
        ("grpo_norm_by_std=false", 0.5),
        ("policy_loss_type=dr_grpo", 0.5),
    ],
)
def test_grpo_divides_by_the_deviation_or_not(setting: str, size: float) -> None:
    batch = _batch([1, 1])
    _computed([f"trainer.algorithm.{setting}"], batch, [[1.0, 0.0]])
    assert batch.advantages is not None
    torch.testing.assert_close(batch.advantages, torch.tensor([[size], [-size]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("gamma", "lambd", "returns"),
    [
        (1.0, 1.0, [1.0, 1.0]),  # the reward itself
        (0.5, 1.0, [0.5, 1.0]),
        (1.0, 0.0, [0.2, 1.0]),  # the value of what comes next
        (1.0, 0.5, [0.6, 1.0]),  # half way: residuals -0.3 and 0.8, so -0.3 + 0.4 on top of 0.5
        (0.5, 0.5, [0.3, 1.0]),  # residuals -0.4 and 0.8: -0.4 + 0.2 on top of 0.5
    ],
)
def test_the_critics_targets_follow_gamma_and_lambda(
    gamma: float, lambd: float, returns: list[float]
) -> None:
    batch = _batch([2, 1], values=[[0.5, 0.2], [0.5, 0.0]])
    _computed(
        [GAE, f"trainer.algorithm.gamma={gamma}", f"trainer.algorithm.lambd={lambd}"],
        batch,
        [[1.0, 0.0]],
    )
    assert batch.returns is not None
    torch.testing.assert_close(batch.returns, torch.tensor([returns, [0.0, 0.0]]))


def test_what_the_values_explain_is_measured() -> None:
    batch = _batch([2, 1], values=[[0.5, 0.5], [0.5, 0.0]])
    stats = _computed([GAE], batch, [[1.0, 0.0]])
    # Returns 1, 1, 0 against values that do not vary.
    assert stats["critic/mean_value"] == pytest.approx(0.5)
    assert stats["critic/mean_return"] == pytest.approx(2 / 3)
    assert stats["critic/explained_variance"] == pytest.approx(0.0, abs=1e-6)
    knowing = _batch([2, 1], values=[[0.9, 0.9], [-0.1, 0.0]])
    assert _computed([GAE], knowing, [[1.0, 0.0]])["critic/explained_variance"] == pytest.approx(
        1.0
    )
    assert (
        _computed([GAE], _batch([1, 1], values=[[0.0], [1.0]]), [[1.0, 1.0]])[
            "critic/explained_variance"
        ]
        == 0
    )


@pytest.mark.parametrize("coefficient", [0.1, 0.2])
@pytest.mark.parametrize(
    ("estimator", "kl"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1.5), ("abs", 0.5)]
)
def test_kl_is_taken_off_each_tokens_reward(estimator: str, kl: float, coefficient: float) -> None:
    batch = _batch([2, 1])
    settings = [
        f"trainer.algorithm.kl_estimator={estimator}",
        f"trainer.algorithm.kl_loss_coef={coefficient}",
    ]
    stats = _computed([*KL_IN_REWARD, *settings], batch, [[1.0, 0.0]])
    # Two tokens against one: 1 - 2 c kl against -c kl.
    difference = 1 - coefficient * kl
    assert batch.advantages is not None
    torch.testing.assert_close(
        batch.advantages, torch.tensor([[difference] * 2, [-difference, 0.0]])
    )
    assert stats["kl_in_reward"] == pytest.approx(kl, rel=1e-5)


def test_without_kl_in_the_reward_the_reference_does_not_matter() -> None:
    batch = _batch([2, 1])
    stats = _computed(["trainer.algorithm.advantage_estimator=rloo"], batch, [[1.0, 0.0]])
    assert batch.advantages is not None
    torch.testing.assert_close(batch.advantages, torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
    assert stats == {}


@pytest.mark.parametrize(
    ("settings", "trained", "share"),
    [
        ([], [2, 1, 2, 1], None),
        (["trainer.algorithm.zero_variance_filter=true"], [2, 1, 0, 0], 0.5),
        (["generator.apply_overlong_filtering=true"], [0, 1, 2, 1], 0.25),
        (
            [
                "trainer.algorithm.zero_variance_filter=true",
                "generator.apply_overlong_filtering=true",
            ],
            [0, 1, 0, 0],
            0.75,
        ),
    ],
)
def test_what_is_left_out_of_the_loss(
    settings: list[str], trained: list[int], share: float | None
) -> None:
    batch = _batch([2, 1, 2, 1])
    # The first completion was cut; the second group's rewards are equal, tenths that no binary
    # number is.
    stats = _computed(settings, batch, [[1.0, 0.0], [0.1, 0.1]], cut=[True, False, False, False])
    assert batch.loss_mask.sum(dim=1).tolist() == trained
    assert stats.get("frac_masked_completions") == share
    # Left out of the loss is not left out of the group: the others' advantages stay.
    assert batch.advantages is not None
    torch.testing.assert_close(
        batch.advantages[:2, 0], torch.tensor([1.0, -1.0]) * math.sqrt(0.5), atol=1e-5, rtol=0
    )
    assert batch.mask.sum(dim=1).tolist() == [2, 1, 2, 1]
