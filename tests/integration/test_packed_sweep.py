"""A sweep whose trials train together: each as it would alone, to the bit; those that fail or cannot share apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from harness import metrics, sweep
from harness import recipe as recipes
from harness.metrics import MetricsFile
from harness.rundir import RunDir
from rltrain.trainer import run

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

RANK, LR, TARGETS = "trainer.policy.model.lora.rank", "trainer.policy.optimizer_config.lr", "trainer.target_modules"
STEPS, LOSS, ENV = "trainer.max_steps", "trainer.algorithm.policy_loss_type", "environment.env_class"
GOOD, RAISES = "tests.faults.moods.good", "tests.faults.moods.raises"
AXES = (RANK, LR, TARGETS, STEPS, LOSS, ENV)
TRIALS: list[tuple[Any, ...]] = [
    (8, 1e-3, "all-linear", 4, "regular", GOOD),
    (1, 1e-2, "attention", 2, "regular", GOOD),
    (4, 1e-3, "mlp", 4, "regular", RAISES),
    (0, 1e-4, "all-linear", 2, "regular", GOOD),
    (16, 3e-3, "mlp", 3, "gspo", GOOD),
]


def without_timings(run_dir: RunDir) -> list[dict[str, float]]:
    return [metrics.without_timings(row) for row in MetricsFile(run_dir.metrics).rows()]


def members(run_dir: RunDir) -> list[float]:
    return [row["perf/members"] for row in MetricsFile(run_dir.metrics).rows() if row["step"] > 0]


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_packed_and_alone_are_the_same_to_the_bit(backend: str, small_data: list[str], tmp_path: Path) -> None:
    trials = TRIALS if backend == "transformers" else [TRIALS[0], TRIALS[4]]
    first = [dict(zip(AXES, values, strict=True)) for values in trials]
    # Rows that name their environment would not heed the axis.
    data = []
    for override in small_data[:2]:
        key, _, file = override.rstrip("]").partition("=[")
        pd.read_parquet(file).drop(columns="env_class").to_parquet(tmp_path / Path(file).name)
        data.append(f"{key}=[{tmp_path / Path(file).name}]")
    space: dict[str, Any] = {
        key: {"choices": sorted({values[i] for values in trials}, key=str)} for i, key in enumerate(AXES)
    }
    space[LR] = {"low": 1e-4, "high": 1e-2, "log": True}
    recipe = tmp_path / "packed.yaml"
    recipe.write_text(yaml.safe_dump({
        "defaults": ["base", "quickstart", "_self_"],
        "trainer": {"ckpt_path": str(tmp_path / "runs"), "run_name": "packed"},
        "sweep": {"num_trials": len(trials), "seeds": [0], "sampler": "random", "pruner": None, "max_concurrent": 1,
                  "pack_size": 3, "first_trials": first,
                  "space": {"trainer.policy.model.lora.alpha": None} | space},
    }))  # fmt: skip
    assert sweep.main([str(recipe), *small_data[2:], *data, f"generator.backend={backend}"]) == 0
    sweep_dir = RunDir(tmp_path / "runs" / "packed")
    said = [sweep_dir.trial(number).read_manifest() for number in range(len(trials))]
    assert [m["status"] for m in said] == ["FAILED" if values[-1] == RAISES else "COMPLETE" for values in trials]
    for number, values in enumerate(trials):
        trial = sweep_dir.trial(number)
        if values[-1] == RAISES:
            assert said[number]["reason"].startswith("LookupError: no score for")
            assert "Traceback" in trial.log.read_text()
            continue
        alone = RunDir(tmp_path / f"alone{number}")
        alone.create(trial.recipe.read_text(), {"status": "CREATED", "status_history": []})
        assert list(run(recipes.read(trial.recipe), alone))
        assert without_timings(alone) == without_timings(trial), number
        for file in ["model.safetensors"] if values[0] == 0 else ["adapter_model.safetensors", "adapter_config.json"]:
            ours, theirs = (one.adapter / "final" / file for one in (trial, alone))
            assert ours.read_bytes() == theirs.read_bytes(), number
        if values[0] == 0:
            assert set(members(trial)) == {1.0}
    assert max(members(sweep_dir.trial(0))) > 1
