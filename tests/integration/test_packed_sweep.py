"""Test sweeps whose trials train together in packs.

Each trial equals its run alone to the bit. Trials that fail or cannot share are separate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from harness import sweep
from harness.config import metrics
from harness.config import recipe as recipes
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from rltrain.worker_group import train_run

pytestmark = pytest.mark.timeout(600)

RANK, LR, TARGETS = (
    "trainer.policy.model.lora.rank",
    "trainer.policy.optimizer_config.lr",
    "trainer.target_modules",
)
STEPS, LOSS, DATA = "trainer.max_steps", "trainer.algorithm.policy_loss_type", "data.train_data"
# Training files by the environment that their rows name.
GOOD, RAISES, EXITS = "good", "raises", "exits"
AXES = (RANK, LR, TARGETS, STEPS, LOSS, DATA)
TRIALS: list[tuple[Any, ...]] = [
    (8, 1e-3, "all-linear", 4, "regular", GOOD),
    (1, 1e-2, "attention", 2, "regular", GOOD),
    (4, 1e-3, "mlp", 4, "regular", RAISES),
    (0, 1e-4, "all-linear", 2, "regular", GOOD),
    (16, 3e-3, "mlp", 3, "gspo", GOOD),
    (2, 1e-3, "mlp", 2, "regular", EXITS),
]
FAILS = {
    RAISES: "the reward of tests.faults.environments.raises raised LookupError",
    EXITS: "the reward of tests.faults.environments.exits raised SystemExit",
}


def compared(run_dir: RunDir) -> list[dict[str, float]]:
    """Return a run's log without timings."""
    return [metrics.without_timings(row) for row in MetricsFile(run_dir.metrics).rows()]


def members(run_dir: RunDir) -> list[float]:
    return [row["perf/members"] for row in MetricsFile(run_dir.metrics).rows() if row["step"] > 0]


def packed_sweep(
    trials: list[tuple[Any, ...]], pack_size: int, folder: Path, *overrides: str
) -> RunDir:
    """Run a sweep of these trials in one pack of that many slots; return its directory."""
    space: dict[str, Any] = {
        key: {"choices": sorted({values[i] for values in trials}, key=str)}
        for i, key in enumerate(AXES)
    }
    trials = [(*values[:-1], [str(folder / f"{values[-1]}.parquet")]) for values in trials]
    space[DATA] = {
        "choices": [[str(folder / f"{name}.parquet")] for name in space[DATA]["choices"]]
    }
    space[LR] = {"low": 1e-4, "high": 1e-2, "log": True}
    recipe = folder / "packed.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "defaults": ["base", "quickstart", "_self_"],
                "trainer": {"ckpt_path": str(folder / "runs"), "run_name": "packed"},
                "sweep": {
                    "num_trials": len(trials),
                    "seeds": [0],
                    "sampler": "random",
                    "pruner": None,
                    "max_concurrent": 1,
                    "pack_size": pack_size,
                    "first_trials": [dict(zip(AXES, values, strict=True)) for values in trials],
                    "space": {"trainer.policy.model.lora.alpha": None} | space,
                },
            }
        )
    )
    assert sweep.main([str(recipe), *overrides]) == 0
    return RunDir(folder / "runs" / "packed")


@pytest.fixture
def data(small_data: list[str], tmp_path: Path) -> list[str]:
    """Return overrides for little data, and for the training files of the axis."""
    key, _, file = small_data[0].rstrip("]").partition("=[")
    assert key == DATA
    for name in (GOOD, RAISES, EXITS):
        rows = pd.read_parquet(file).assign(env_class=f"tests.faults.environments.{name}")
        rows.to_parquet(tmp_path / f"{name}.parquet")
    return small_data


def assert_as_alone(trial: RunDir, folder: Path) -> None:
    """Train a trial's recipe alone and compare metrics and adapter, to the bit."""
    alone = RunDir(folder)
    alone.create(trial.recipe.read_text(), {"status": "CREATED", "status_history": []})
    recipe = recipes.read(trial.recipe)
    assert list(train_run(recipe, alone))
    assert compared(alone) == compared(trial), trial.path.name
    adapter = ["adapter_model.safetensors", "adapter_config.json"]
    for file in adapter if recipe.trainer.policy.model.lora.rank else ["model.safetensors"]:
        ours, theirs = (one.adapter / "final" / file for one in (trial, alone))
        assert ours.read_bytes() == theirs.read_bytes(), trial.path.name


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_packed_trials_equal_runs_alone_to_the_bit(
    backend: str, data: list[str], tmp_path: Path
) -> None:
    trials = [TRIALS[0], *TRIALS[2:]] if backend == "transformers" else [TRIALS[0], TRIALS[4]]
    sweep_dir = packed_sweep(trials, 3, tmp_path, *data, f"generator.backend={backend}")
    manifests = [sweep_dir.trial(number).read_manifest() for number in range(len(trials))]
    assert [m["status"] for m in manifests] == [
        "FAILED" if values[-1] in FAILS else "COMPLETE" for values in trials
    ]
    for number, values in enumerate(trials):
        trial = sweep_dir.trial(number)
        if values[-1] in FAILS:
            assert manifests[number]["reason"].startswith(FAILS[values[-1]])
            assert "Traceback" in trial.log.read_text()
            continue
        assert_as_alone(trial, tmp_path / f"alone{number}")
        if values[0] == 0:
            assert set(members(trial)) == {1.0}
    assert max(members(sweep_dir.trial(0))) > 1


RANKS = [
    "trainer.placement.policy_num_gpus_per_node=2",
    "generator.num_inference_engines=2",
    "generator.backend=vllm",
]


@pytest.mark.slow
def test_a_pack_on_two_ranks(data: list[str], tmp_path: Path) -> None:
    trials = [TRIALS[0], TRIALS[1], TRIALS[4]]
    sweep_dir = packed_sweep(trials, 2, tmp_path, *data, *RANKS)
    packed = [sweep_dir.trial(number) for number in range(3)]
    assert [trial.read_manifest()["status"] for trial in packed] == ["COMPLETE"] * 3
    # The third trial starts when the second has ended.
    assert [max(members(trial)) for trial in packed[:2]] == [2, 2]
    assert_as_alone(packed[0], tmp_path / "alone")


@pytest.mark.slow
def test_a_trial_restarts_alone_when_another_failed_on_two_ranks(
    data: list[str], tmp_path: Path
) -> None:
    sweep_dir = packed_sweep([TRIALS[0], TRIALS[2]], 2, tmp_path, *data, *RANKS)
    manifests = [sweep_dir.trial(number).read_manifest() for number in range(2)]
    assert [m["status"] for m in manifests] == ["COMPLETE", "FAILED"]
    assert manifests[1]["reason"].startswith(FAILS[RAISES])
    assert set(members(sweep_dir.trial(0))[1:]) == {1.0}
