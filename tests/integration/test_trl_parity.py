"""Compare advantages, importance weights and losses with TRL's on the same tensors.

Values and gradients are compared. TRL's trainers are real; only the slow parts are replaced:
completions, and the log-probabilities of their model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from rltrain.algorithms.advantages import ADVANTAGES, AdvantageInputs, token_rewards
from rltrain.algorithms.losses import (
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REDUCTIONS,
    TIS,
    PolicyInputs,
    Totals,
)

PROMPTS, GROUP, WIDTH, LIMIT = 2, 3, 5, 8
ROWS = PROMPTS * GROUP
LOW, HIGH, DUAL, CAP, BETA = 0.2, 0.28, 1.8, 1.5, 0.1
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Case:
    """Input of both implementations: `[B, T]` tensors, and a score per completion."""

    logprobs: torch.Tensor
    old: torch.Tensor
    reference: torch.Tensor
    engine: torch.Tensor
    mask: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of one implementation."""

    advantages: torch.Tensor
    weights: torch.Tensor | None
    loss: torch.Tensor
    gradient: torch.Tensor


def _case(seed: int) -> Case:
    """Return a case with some clipped log-ratios and scores in thousands.

    Epsilons do not matter beside such scores.
    """
    generator = torch.Generator().manual_seed(seed)

    def near(centre: torch.Tensor, spread: float) -> torch.Tensor:
        return centre + spread * torch.randn(centre.shape, generator=generator)

    logprobs = near(torch.full((ROWS, WIDTH), -3.0), 1.0)
    lengths = torch.randint(1, WIDTH + 1, (ROWS, 1), generator=generator)
    lengths[0] = WIDTH
    mask = (torch.arange(WIDTH) < lengths).float()
    old = near(logprobs, 0.5) * mask
    scores = near(torch.zeros(ROWS), 1000.0)
    return Case(logprobs, old, near(logprobs, 0.5) * mask, near(old, 0.3) * mask, mask, scores)


@pytest.fixture(scope="module")
def trl() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it lists the vLLM versions that it was tested with
        module = pytest.importorskip("trl", reason="TRL comes with the dev extra")
        for name in ("GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer"):
            getattr(module, name)  # loaded at first use, with its warnings
    return module


Build = Callable[..., Any]


@pytest.fixture
def build(trl: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Return a function that builds a TRL trainer of either kind around a tiny model."""
    from huggingface_hub import constants
    from transformers import AutoModelForCausalLM, AutoTokenizer

    datasets = import_module("datasets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # TRL reports each new trainer

    def make(kind: str, case: Case, **chosen: Any) -> Any:
        scores = case.scores.tolist()
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=ROWS,
            num_generations=GROUP,
            max_completion_length=LIMIT,
            num_iterations=2,
            **chosen,
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_dir),
            reward_funcs=lambda completions, **_: scores,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["1+1="] * PROMPTS}),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
        )
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def _scored(trainer: Any, kind: str, case: Case) -> dict[str, torch.Tensor]:
    """Return TRL's rewards, advantages and importance weights of the case's completions."""
    lengths = case.mask.sum(dim=1).long().tolist()
    prompts, completions = [[1, 2]] * ROWS, [[1] * length for length in lengths]
    texts = ["x"] * ROWS
    engine = [row[:length].tolist() for row, length in zip(case.engine, lengths, strict=True)]
    generated: tuple[Any, ...] = (prompts, completions, None, texts, engine, {}, None, None)
    trainer._generate = lambda _: generated if kind == "GRPO" else (prompts, completions, texts)

    def given(model: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        return (case.old if model is trainer.model else case.reference), None, None

    trainer._get_per_token_logps_and_entropies = given
    trainer.model.train()
    scored: dict[str, torch.Tensor] = trainer._generate_and_score_completions(
        [{"prompt": "1+1="}] * ROWS
    )
    return scored


def _theirs(trainer: Any, case: Case, engine: bool) -> Outcome:
    trainer.use_vllm = engine  # after construction, which would start one
    inputs = _scored(trainer, "GRPO", case)
    leaf = case.logprobs.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        leaf,
        torch.zeros_like(leaf),
        None,
    )
    loss = trainer._compute_loss(trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return Outcome(
        inputs["advantages"], inputs.get("importance_sampling_ratio"), loss.detach(), gradient
    )


def _returns(case: Case, norm_by_std: bool, kl: torch.Tensor | None = None) -> AdvantageInputs:
    rewards = token_rewards(case.scores, case.mask, kl, BETA)
    return AdvantageInputs(rewards, case.mask, GROUP, None, 1.0, 1.0, norm_by_std)


def _ours(
    case: Case, policy: str, reduction: str, norm_by_std: bool, kl: bool, tis: str | None
) -> Outcome:
    leaf = case.logprobs.clone().requires_grad_()
    advantages = ADVANTAGES["grpo"](_returns(case, norm_by_std))
    inputs = PolicyInputs(leaf, case.old, advantages, case.mask, LOW, HIGH, DUAL)
    losses, _ = POLICY_LOSSES[policy](inputs)
    weights = None if tis is None else TIS[tis](case.old, case.engine, case.mask, CAP)
    losses = losses if weights is None else losses * weights
    if kl:
        losses = losses + BETA * KL_ESTIMATORS["k3"](leaf, case.reference)
    totals = Totals(tokens=int(case.mask.sum()), sequences=ROWS, max_length=LIMIT)
    loss = REDUCTIONS[reduction](losses, case.mask, totals)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return Outcome(advantages, weights, loss.detach(), gradient)


LOSSES: list[tuple[str, str, dict[str, Any]]] = [
    # Our loss and its reduction; TRL's loss type and the settings that make it the same.
    ("regular", "sequence_mean", {"loss_type": "grpo"}),
    ("regular", "token_mean", {"loss_type": "bnpo"}),
    ("regular", "token_mean", {"loss_type": "dapo"}),
    ("dr_grpo", "seq_mean_token_sum_norm", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    ("dual_clip", "token_mean", {"loss_type": "dapo", "delta": DUAL}),
    ("dual_clip", "sequence_mean", {"loss_type": "grpo", "delta": DUAL}),
    ("gspo", "sequence_mean", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("gspo", "token_mean", {"loss_type": "bnpo", "importance_sampling_level": "sequence"}),
    # TRL bounds the ratio, not its distance from 1.
    ("cispo", "token_mean", {"loss_type": "cispo", "epsilon_high": 1 + HIGH}),
]
# Left out: gspo with weights per token. TRL spreads the gradient of a sequence's ratio evenly
# before it applies the weights. Ours follows GSPO-token, in which each token's gradient has the
# token's weight.
COMPARED = [
    pytest.param(
        *loss,
        kl,
        tis,
        id=f"{loss[0]}-{loss[1]}-{loss[2]['loss_type']}-{'kl' if kl else 'no_kl'}-{tis}",
    )
    for loss in LOSSES
    for kl in (False, True)
    for tis in (None, "token", "sequence")
    if (loss[0], tis) != ("gspo", "token")
]


@pytest.mark.parametrize(("policy", "reduction", "settings", "kl", "tis"), COMPARED)
def test_loss_and_gradient(
    build: Build, policy: str, reduction: str, settings: dict[str, Any], kl: bool, tis: str | None
) -> None:
    chosen: dict[str, Any] = {
        "epsilon": LOW,
        "epsilon_high": HIGH,
        "beta": BETA if kl else 0.0,
        **settings,
    }
    chosen["use_bias_correction_kl"] = (
        False  # by default TRL multiplies the divergence by the ratio too
    )
    if tis is not None:
        chosen |= {
            "vllm_importance_sampling_mode": f"{tis}_truncate",
            "vllm_importance_sampling_clip_max": CAP,
        }
    for seed in SEEDS:
        case = _case(seed)
        theirs = _theirs(build("GRPO", case, **chosen), case, engine=tis is not None)
        ours = _ours(case, policy, reduction, settings.get("scale_rewards") != "none", kl, tis)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=1e-4, atol=1e-6)
        assert theirs.gradient.any()


@pytest.mark.parametrize("policy", ["regular", "dual_clip", "gspo", "cispo"])
def test_the_cases_reach_the_bounds(policy: str) -> None:
    """Check that the cases are clipped; otherwise the comparison would not test clipping."""
    shares = []
    for case in map(_case, SEEDS):
        advantages = ADVANTAGES["grpo"](_returns(case, norm_by_std=True))
        _, held = POLICY_LOSSES[policy](
            PolicyInputs(case.logprobs, case.old, advantages, case.mask, LOW, HIGH, DUAL)
        )
        shares.append(float((held * case.mask).sum() / case.mask.sum()))
    assert 0 < sum(shares) / len(shares) < 1
    assert any(
        TIS["token"](case.old, case.engine, case.mask, CAP).eq(CAP).any()
        for case in map(_case, SEEDS)
    )


@pytest.mark.parametrize(("scale", "norm_by_std"), [("group", True), ("none", False)])
@pytest.mark.parametrize("seed", SEEDS)
def test_group_advantages(build: Build, scale: str, norm_by_std: bool, seed: int) -> None:
    case = _case(seed)
    theirs = _scored(build("GRPO", case, scale_rewards=scale), "GRPO", case)["advantages"]
    ours = ADVANTAGES["grpo"](_returns(case, norm_by_std))
    torch.testing.assert_close(ours, theirs.unsqueeze(1) * case.mask, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, BETA], ids=["", "kl_in_reward"])
@pytest.mark.parametrize("seed", SEEDS)
def test_leave_one_out_advantages(build: Build, beta: float, seed: int) -> None:
    case = _case(seed)
    theirs = _scored(build("RLOO", case, beta=beta), "RLOO", case)["advantages"]
    kl = KL_ESTIMATORS["k1"](case.old, case.reference) if beta else None
    ours = ADVANTAGES["rloo"](_returns(case, norm_by_std=True, kl=kl))
    torch.testing.assert_close(ours, theirs.unsqueeze(1) * case.mask, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("seed", SEEDS)
def test_importance_weights(build: Build, level: str, seed: int) -> None:
    case = _case(seed)
    chosen = {
        "vllm_importance_sampling_mode": f"{level}_truncate",
        "vllm_importance_sampling_clip_max": CAP,
    }
    theirs = _theirs(build("GRPO", case, **chosen), case, engine=True).weights
    assert theirs is not None
    ours = TIS[level](case.old, case.engine, case.mask, CAP)
    torch.testing.assert_close(ours, theirs * case.mask, rtol=1e-5, atol=1e-6)
