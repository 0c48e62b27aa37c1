"""The optimizer's settings, of policy and critic alike, and what the policy minimises, against
numbers by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from harness.config.schema import Recipe
from rltrain.algorithms.critic import Critic
from rltrain.algorithms.policy import Policy
from rltrain.algorithms.trained_model import TrainedModel
from rltrain.data.batch import Batch
from rltrain.distributed.process_group import Ranks
from tests.recipes import quickstart

TOTAL_STEPS = 6
ALONE = Ranks()
MakeModel = Callable[..., tuple[TrainedModel, torch.nn.Parameter]]


@pytest.fixture(scope="module")
def model() -> Any:
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=1, num_key_value_heads=1))


@pytest.fixture(params=["policy", "critic"])
def make(request: pytest.FixtureRequest, model: Any) -> MakeModel:
    """The policy or the critic with one weight of 2 to train, under its optimizer_config with these
    settings.
    """

    def build(*settings: str) -> tuple[TrainedModel, torch.nn.Parameter]:
        keys = [
            f"trainer.{request.param}.optimizer_config.{setting}"
            for setting in settings
            if "bad" not in setting
        ]
        others = [f"trainer.{setting}" for setting in settings if "bad" in setting]
        recipe = quickstart([*keys, *others])
        weight = torch.nn.Parameter(torch.tensor([2.0]))
        if request.param == "critic":
            return Critic("critic", model, {"weight": weight}, recipe, TOTAL_STEPS), weight
        return Policy(
            "policy", model, {"weight": weight}, recipe, None, TOTAL_STEPS, math.inf
        ), weight

    return build


def _step(trained: TrainedModel, weight: torch.nn.Parameter, gradient: float) -> dict[str, float]:
    weight.grad = torch.tensor([gradient])
    return trained.optimize(ALONE)


def test_adamw_is_one_fused_call(make: MakeModel) -> None:
    assert make("lr=0.1")[0].optimizer.defaults["fused"] is True


@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_adams_first_step_is_the_learning_rate(make: MakeModel, lr: float) -> None:
    trained, weight = make(f"lr={lr}")
    assert _step(trained, weight, 0.3)["learning_rate"] == pytest.approx(lr)
    assert weight.item() == pytest.approx(2 - lr, rel=1e-5)


@pytest.mark.parametrize(
    ("betas", "second"),
    [
        # After gradients of 0.5 and -1: the mean's estimate over the root of the square's.
        ("[0,0]", 1.0),
        (
            "[0.9,0.999]",
            (0.9 * 0.05 - 0.1) / 0.19 / -math.sqrt((0.999 * 0.00025 + 0.001) / 0.001999),
        ),
        ("[0,0.5]", 1 / math.sqrt((0.5 * 0.125 + 0.5) / 0.75)),
    ],
)
def test_betas_say_how_long_gradients_are_remembered(
    make: MakeModel, betas: str, second: float
) -> None:
    trained, weight = make("lr=0.1", f"betas={betas}", "max_grad_norm=10")
    _step(trained, weight, 0.5)
    _step(trained, weight, -1.0)
    assert weight.item() == pytest.approx(2 - 0.1 + 0.1 * second, rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weight_decay_pulls_towards_zero(make: MakeModel, decay: float) -> None:
    trained, weight = make("lr=0.1", f"weight_decay={decay}")
    _step(trained, weight, 0.3)
    assert weight.item() == pytest.approx(2 * (1 - 0.1 * decay) - 0.1, rel=1e-5)


@pytest.mark.parametrize(("limit", "used"), [(0.5, 0.5), (1.0, 1.0), (9.0, 4.0)])
def test_gradients_longer_than_the_limit_are_scaled_to_it(
    make: MakeModel, limit: float, used: float
) -> None:
    trained, weight = make(f"max_grad_norm={limit}")
    seen: list[float] = []

    def look(*_: object) -> None:
        assert weight.grad is not None
        seen.append(weight.grad.item())

    trained.optimizer.register_step_pre_hook(look)
    assert _step(trained, weight, -4.0)["grad_norm"] == 4.0
    assert seen == [pytest.approx(-used, rel=1e-4)]


@pytest.mark.parametrize(
    ("scheduler", "warmup", "factors"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ("linear", 2, [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", 2, [0, 0.5, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0]),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    make: MakeModel, scheduler: str, warmup: int, factors: list[float]
) -> None:
    settings = "lr=0.2", f"scheduler={scheduler}", f"num_warmup_steps={warmup}"
    trained, weight = make(*settings)
    rates = []
    for _ in factors:
        rates.append(trained.learning_rate)
        _step(trained, weight, 0.3)
        trained.scheduler.step()
    assert rates == pytest.approx([0.2 * factor for factor in factors], abs=1e-7)
    resumed, _ = make(*settings)
    for step, rate in enumerate(rates):
        resumed.set_step(step)
        assert resumed.learning_rate == rate


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_gradients_in_a_row_that_are_no_numbers_fail_the_run(
    make: MakeModel, limit: int
) -> None:
    trained, weight = make("lr=0.1", f"max_bad_steps={limit}")
    for _ in range(limit - 1):
        assert _step(trained, weight, math.nan)["skipped_updates"] == 1
    assert weight.item() == 2
    if limit > 1:
        assert _step(trained, weight, 0.3)["skipped_updates"] == 0  # the count starts anew
        for _ in range(limit - 1):
            _step(trained, weight, math.inf)
    with pytest.raises(
        FloatingPointError, match=f"the {trained.name}'s gradient was not finite {limit} times"
    ):
        _step(trained, weight, math.nan)


def policy_of(recipe: Recipe) -> Policy:
    """A policy without a model, for its loss of given log-probabilities."""
    weight = torch.nn.Parameter(torch.ones(1))
    return Policy("policy", None, {"weight": weight}, recipe, None, 1, math.inf)


def _batch(ratios: list[list[float]], advantages: list[list[float]]) -> tuple[torch.Tensor, Batch]:
    """Log-probabilities now, and a batch of old ones such that tokens have these ratios; 0 is
    padding.
    """
    ratio = torch.tensor(ratios)
    mask = (ratio > 0).float()
    logprobs = torch.full_like(ratio, -1.0)
    batch = Batch(
        prompt_ids=torch.zeros(len(ratios), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(ratios), 1, dtype=torch.long),
        completion_ids=torch.zeros_like(ratio, dtype=torch.long),
        mask=mask,
        loss_mask=mask.clone(),
        engine_logprobs=logprobs,
        old_logprobs=logprobs - torch.where(mask > 0, ratio, 1.0).log(),
        advantages=torch.tensor(advantages) * mask,
    )
    return logprobs, batch


def _loss(settings: list[str], ratios: list[list[float]], advantages: list[list[float]]) -> float:
    policy = policy_of(quickstart([f"trainer.algorithm.{setting}" for setting in settings]))
    logprobs, batch = _batch(ratios, advantages)
    return float(policy.objective(logprobs, batch, policy.totals(batch))[0])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Ratios of 2 and 0.5 under an advantage of 1, and of 5 under -1: bounds 0.8 and 1.2, c = 3.
        ("regular", (-1.2 - 0.5 + 5) / 3),
        ("dual_clip", (-1.2 - 0.5 + 3) / 3),
        ("gspo", (-1.0 - 1.0 + 5) / 3),
        ("cispo", (1.2 + 0.5 - 1.2) / 3),  # times a log-probability of -1
        ("dr_grpo", (-1.2 - 0.5 + 5) / (64 * 2)),
    ],
)
def test_each_policy_loss_is_its_own(loss: str, expected: float) -> None:
    found = _loss([f"policy_loss_type={loss}"], [[2.0, 0.5], [5.0, 0.0]], [[1.0, 1.0], [-1.0, 0.0]])
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "ratio", "advantage", "expected"),
    [
        (["eps_clip_high=0.2"], 2.0, 1.0, -1.2),
        (["eps_clip_high=0.5"], 2.0, 1.0, -1.5),
        (["eps_clip_high=0.5"], 0.1, -1.0, 0.8),
        (["eps_clip_low=0.2"], 0.1, -1.0, 0.8),
        (["eps_clip_low=0.5"], 0.1, -1.0, 0.5),
        (["eps_clip_low=0.5"], 2.0, 1.0, -1.2),
        (["policy_loss_type=cispo", "eps_clip_high=0.5"], 2.0, 1.0, 1.5),
        (["policy_loss_type=dual_clip", "clip_ratio_c=3"], 9.0, -1.0, 3.0),
        (["policy_loss_type=dual_clip", "clip_ratio_c=5"], 9.0, -1.0, 5.0),
    ],
)
def test_bounds_of_the_ratio(
    settings: list[str], ratio: float, advantage: float, expected: float
) -> None:
    assert _loss(settings, [[ratio]], [[advantage]]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", -5 / 4),
        ("sequence_mean", -(1 + 2) / 2),
        ("seq_mean_token_sum_norm", -5 / (64 * 2)),
    ],
)
def test_each_reduction_weighs_tokens_its_way(reduction: str, expected: float) -> None:
    # One sequence of three tokens with an advantage of 1, one of a token with 2.
    found = _loss(
        [f"loss_reduction={reduction}"], [[1.0] * 3, [1.0, 0.0, 0.0]], [[1.0] * 3, [2.0] * 3]
    )
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["regular", "dual_clip", "gspo", "cispo", "dr_grpo"])
@pytest.mark.parametrize("kl", [False, True])
def test_only_what_cannot_have_a_gradient_is_said_not_to_move(loss: str, kl: bool) -> None:
    recipe = quickstart(
        [
            f"trainer.algorithm.policy_loss_type={loss}",
            f"trainer.algorithm.use_kl_loss={kl}",
            "trainer.algorithm.tis=token",
        ]
    )
    policy = policy_of(recipe)
    # An advantage of zero; one that stands on padding alone; one on a token.
    logprobs, batch = _batch(
        [[1.1, 0.5], [1.1, 0.0], [1.1, 0.5]], [[0.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    )
    batch.ref_logprobs = logprobs - 0.3
    leaf = logprobs.requires_grad_()
    policy.objective(leaf, batch, policy.totals(batch))[0].backward()
    assert leaf.grad is not None
    moves = leaf.grad.ne(0).any(dim=1)
    assert moves.tolist() == ([True] * 3 if kl else [False, False, True])
    assert policy.needs_grad(batch).tolist() == moves.tolist()


def test_a_step_leaves_no_gradient_for_the_next(make: MakeModel) -> None:
    trained, weight = make()
    _step(trained, weight, 0.3)
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("kl", [False, True])
def test_completions_left_out_of_the_loss_mask_change_nothing(kl: bool) -> None:
    settings = [f"trainer.algorithm.use_kl_loss={kl}", "trainer.algorithm.tis=token"]
    policy = policy_of(quickstart(settings))

    def seen(ratios: list[list[float]], advantages: list[list[float]]) -> dict[str, float]:
        logprobs, batch = _batch(ratios, advantages)
        batch.loss_mask[1:] = 0
        batch.ref_logprobs = logprobs - 0.3
        stats = policy.objective(logprobs, batch, policy.totals(batch))[1]
        return {name: float(value) for name, value in stats.items()}

    alone = seen([[1.1, 0.5]], [[1.0, 1.0]])
    assert seen([[1.1, 0.5], [5.0, 3.0]], [[1.0, 1.0], [-1.0, -1.0]]) == pytest.approx(alone)
