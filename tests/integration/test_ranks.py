"""Test that several processes train like one, with real vLLM engines and gloo.

Losses, gradients and checkpoints are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from harness.config import recipe as recipes
from harness.records import manifest
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from rltrain.worker_group import train_run
from tests.recipes import quickstart

pytestmark = pytest.mark.timeout(600)

STEPS = 4
COMPARED = ("loss", "kl", "entropy", "reward", "completions/mean_length")
CRITIC = ("critic/vf_loss", "critic/explained_variance")
PPO = [
    "trainer.algorithm.advantage_estimator=gae",
    "trainer.algorithm.lambd=0.95",
    "trainer.policy_mini_batch_size=2",
    "trainer.critic.optimizer_config.lr=1e-3",
]
FULL = [
    "trainer.policy.model.lora.rank=0",
    "trainer.policy.model.lora.sync=merge",
    "trainer.policy.optimizer_config.lr=1e-4",
]

Train = Callable[..., RunDir]


def ranks(number: int) -> list[str]:
    """Return overrides for this number of training processes on the CPU, each with its engine."""
    return [
        f"trainer.placement.policy_num_gpus_per_node={number}",
        f"generator.num_inference_engines={number}",
    ]


@pytest.fixture(scope="module")
def train(small_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains quickstart on little data, one update a step.

    It returns the run's directory.
    """
    names = (f"run{i}" for i in itertools.count())
    root = tmp_path_factory.mktemp("runs")

    def make(*overrides: str, run_dir: RunDir | None = None, reports: int | None = None) -> RunDir:
        recipe = quickstart(
            [
                *small_data,
                "generator.backend=vllm",
                "trainer.algorithm.use_kl_loss=true",
                f"trainer.max_steps={STEPS}",
                "trainer.eval_before_train=false",
                "trainer.eval_interval=2",
                "trainer.ckpt_interval=1",
                "trainer.max_ckpts_to_keep=9",
                "trainer.policy_mini_batch_size=4",
                *overrides,
            ]
        )
        recipe.sweep = None
        run_dir = run_dir or RunDir(root / next(names))
        if not run_dir.manifest.exists():
            record = manifest.build(recipe, kind="run", name=run_dir.path.name, source="test")
            run_dir.create(recipes.to_yaml(recipe), record)
        for _ in itertools.islice(train_run(recipe, run_dir), reports):
            pass
        return run_dir

    return make


@pytest.fixture(scope="module")
def alone(train: Train) -> RunDir:
    """Train the run on one process."""
    return train()


def rows(run_dir: RunDir) -> list[dict[str, float]]:
    return MetricsFile(run_dir.metrics).rows()


def assert_same_training(one: RunDir, other: RunDir, names: tuple[str, ...] = COMPARED) -> None:
    first, second = rows(one), rows(other)
    assert (
        [row["step"] for row in first]
        == [row["step"] for row in second]
        == list(range(1, STEPS + 1))
    )
    for a, b in zip(first, second, strict=True):
        for name in names:
            assert b[name] == pytest.approx(a[name], abs=1e-5), (a["step"], name)
        # AdamW divides by small moments, so a rounding error grows with the first update.
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)
    scores = [
        [row["eval/accuracy"] for row in run if "eval/accuracy" in row] for run in (first, second)
    ]
    assert len(scores[0]) == 2
    assert scores[0] == scores[1]
    assert any(row["loss"] != first[0]["loss"] for row in first)


def gradients(run_dir: RunDir) -> dict[str, torch.Tensor]:
    """Return the first update's clipped gradients: AdamW's first moment is a tenth of them."""
    moments = weights(run_dir, 1, "optimizer")
    return {name: 10 * tensor for name, tensor in moments.items() if name.endswith("/exp_avg")}


def weights(run_dir: RunDir, step: int, name: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(run_dir.checkpoints / f"step_{step:06d}" / f"{name}.safetensors")


def assert_same_weights(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-4
) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=atol, rtol=0, msg=name)


# Micro-batches differ too: 3 sequences where one process has 4, or up to 300 tokens.
@pytest.mark.parametrize(
    ("number", "micro"),
    [
        (2, "trainer.micro_train_batch_size_per_gpu=3"),
        pytest.param(4, "trainer.max_tokens_per_microbatch=300", marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_same_losses_as_one_process(
    train: Train, alone: RunDir, number: int, micro: str
) -> None:
    several = train(*ranks(number), micro)
    assert several.status is Status.COMPLETE
    assert_same_training(alone, several)
    assert_same_weights(gradients(alone), gradients(several), atol=1e-7)
    assert max(float(gradient.abs().max()) for gradient in gradients(alone).values()) > 1e-3
    # Shared files are written once, by one process: they are whole, and no adapter version is left
    # over.
    assert sorted(p.name for p in several.adapter.iterdir()) == ["best", "final"]
    assert (several.path / "log.txt").is_file()


@pytest.mark.slow
def test_engines_in_separate_processes(train: Train, alone: RunDir) -> None:
    apart = [
        "trainer.placement.colocate_all=false",
        "generator.num_inference_engines=2",
        "trainer.policy.model.lora.sync=memory",
    ]
    assert_same_training(alone, train(*apart))


@pytest.mark.slow
def test_full_fine_tuning_shards_the_weights(train: Train) -> None:
    one, two = train(*FULL), train(*FULL, *ranks(2))
    assert_same_training(one, two)
    assert_same_weights(gradients(one), gradients(two), atol=1e-7)
    saved = load_file(two.adapter / "final" / "model.safetensors")
    assert_same_weights({name: weights(two, STEPS)[name] for name in saved}, saved, atol=0)


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(train: Train) -> None:
    uninterrupted = train(*PPO)
    moved = train(*PPO, *ranks(2), reports=2)
    assert moved.status is Status.RUNNING
    train(*PPO, run_dir=moved, reports=1)
    train(*PPO, *ranks(2), run_dir=moved)
    assert_same_training(uninterrupted, moved, (*COMPARED, *CRITIC))
    for name in ("weights", "critic", "optimizer", "critic_optimizer"):
        one, other = weights(uninterrupted, STEPS, name), weights(moved, STEPS, name)
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert (other[key] - tensor).norm() <= 0.02 * tensor.norm(), (name, key)
