"""Comparisons of runs report all differences, with step and size, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.records.run_dir import RunDir
from rltrain.tools.compare import RunComparison, RunDifference, compare, compare_rows

LAST = 4


def write(run: RunDir) -> RunDir:
    """A run of 4 steps that evaluates at 0, 2 and 4, best at 2; written alike each time, timings
    aside.
    """
    rows: list[dict[str, Any]] = [{"step": 0, "eval/accuracy": 0.25}]
    rows += [
        {"step": n, "reward": n / 8, "kl": None if n == 1 else n / 3, "step_time": id(run)}
        for n in range(1, 5)
    ]
    rows[2]["eval/accuracy"], rows[4]["eval/accuracy"] = 0.5, 0.5
    put(run, rows)
    for step in (0, 2, 4):
        run.samples.mkdir(exist_ok=True)
        samples = [
            {"completion": f"answer {i}", "reward": float(i % 2), "num_tokens": 3} for i in range(6)
        ]
        pd.DataFrame(samples).to_parquet(run.eval_samples(step))
    for name, value in (("best", 1.0), ("final", 2.0)):
        (run.adapter / name).mkdir(parents=True)
        tensors = {
            "a": torch.full((2, 3), value),
            "b": torch.full((4,), value, dtype=torch.bfloat16),
        }
        save_file(tensors, run.adapter / name / "adapter_model.safetensors")
    return run


def put(run: RunDir, rows: list[dict[str, Any]]) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_row(run: RunDir, step: int, **values: Any) -> None:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    put(run, [{**row, **(values if row["step"] == step else {})} for row in rows])


def change_weights(run: RunDir, policy: str, **tensors: torch.Tensor) -> None:
    file = run.adapter / policy / "adapter_model.safetensors"
    save_file({**load_file(file), **tensors}, file)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[RunDir, RunDir]:
    """Two equal runs."""
    return write(RunDir(tmp_path / "one")), write(RunDir(tmp_path / "two"))


def compared(pair: tuple[RunDir, RunDir], last: int = LAST, weights: bool = True) -> RunComparison:
    return compare(*pair, last=last, weights=weights)


def test_equal_runs_are_identical(pair: tuple[RunDir, RunDir]) -> None:
    found = compared(pair)
    assert found.differences == []
    assert found.first(0.0) is None
    assert (
        found.verdict(0.0) == "identical: 5 rows of metrics, 18 completions, weights best and final"
    )


def test_the_first_departure_is_the_earliest_step_and_the_largest_is_told(
    pair: tuple[RunDir, RunDir],
) -> None:
    change_row(pair[1], 3, reward=0.25)
    change_row(pair[1], 4, kl=9.0)
    change_row(pair[1], 2, kl=2 / 3 + 1e-3)
    found = compared(pair)
    first = found.first(0.0)
    assert first is not None
    assert (first.step, first.what) == (2, "kl")
    assert first.size == pytest.approx(1e-3)
    assert found.verdict(0.0) == (
        "departs at step 2: kl 0.666666667 -> 0.667666667 (by 0.001); differences in all: 3, "
        "the largest at step 4: kl 1.33333333 -> 9 (by 7.67)"
    )
    # With a tolerance the first that is larger, not the first.
    first = found.first(0.01)
    assert first is not None
    assert str(first) == "step 3: reward 0.375 -> 0.25 (by 0.125)"


def test_within_a_tolerance_runs_are_equal_and_the_largest_difference_is_told(
    pair: tuple[RunDir, RunDir],
) -> None:
    change_row(pair[1], 2, kl=2 / 3 + 1.11e-6)
    change_row(pair[1], 3, reward=0.375 + 1e-9)
    found = compared(pair)
    assert found.first(1.2e-6) is None
    assert found.verdict(1.2e-6).startswith(
        "equal within 1.2e-06 (largest difference: step 2, kl): 5 rows"
    )
    assert found.first(1.1e-6) is not None


def test_timings_are_no_difference_and_nan_equals_nan(pair: tuple[RunDir, RunDir]) -> None:
    change_row(pair[1], 2, step_time=99.0)
    assert compared(pair).differences == []
    assert compare_rows(1, {"kl": math.nan}, {"kl": math.nan}) == []
    # A row in memory has the infinity that the file writes as null.
    assert compare_rows(1, {"kl": math.nan}, {"kl": math.inf}) == []
    (found,) = compare_rows(1, {"kl": math.nan}, {"kl": 0.5})
    assert (found.was, found.now, found.size) == ("nan", "0.5", math.inf)


def test_a_metric_that_only_one_run_logged(pair: tuple[RunDir, RunDir]) -> None:
    change_row(pair[1], 3, entropy=1.0)
    (found,) = compared(pair).differences
    assert str(found) == "step 3: entropy absent -> 1"


@pytest.mark.parametrize(("shorter", "told"), [(0, "no row -> a row"), (1, "a row -> no row")])
def test_missing_and_extra_rows(pair: tuple[RunDir, RunDir], shorter: int, told: str) -> None:
    rows = [json.loads(line) for line in pair[shorter].metrics.read_text().splitlines()]
    put(pair[shorter], rows[:4])
    (found,) = compared(pair).differences
    assert str(found) == f"step 4: metrics {told}"
    assert compared(pair).first(1e9) is not None


def test_samples_are_compared_completion_by_completion(pair: tuple[RunDir, RunDir]) -> None:
    frame = pd.read_parquet(pair[1].eval_samples(2))
    frame.loc[3, "completion"] = "another " * 20
    frame.head(5).to_parquet(pair[1].eval_samples(2))
    first, second = compared(pair).differences
    assert str(first).startswith("step 2: sample 3's completion 'answer 3' -> 'another another")
    assert str(first).endswith("…")
    assert str(second) == "step 2: sample 5's completion 'answer 5' -> absent"
    pair[1].eval_samples(2).write_bytes(b"PAR1")
    (found,) = compared(pair).differences
    assert str(found) == "step 2: samples 6 rows -> unreadable"
    pair[1].eval_samples(2).unlink()
    (found,) = compared(pair).differences
    assert str(found) == "step 2: samples 6 rows -> absent"


def test_weights_of_the_best_evaluation_count_at_its_step(pair: tuple[RunDir, RunDir]) -> None:
    other = torch.full((2, 3), 1.0)
    other[1, 2] = 1.25
    change_weights(pair[1], "best", a=other)
    (found,) = compared(pair).differences
    assert str(found) == "step 2: weights best: a 1 -> 1.25 (by 0.25)"
    assert compared(pair, weights=False).differences == []


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"b": torch.full((4,), 2.015625, dtype=torch.bfloat16)}, "b 2 -> 2.015625 (by 0.0156)"),
        ({"a": torch.full((3, 2), 2.0)}, "a [2, 3] float32 -> [3, 2] float32"),
        ({"a": torch.full((2, 3), 2.0, dtype=torch.float64)}, "a [2, 3] float32 -> [2, 3] float64"),
        ({"c": torch.ones(1)}, "c absent -> [1] float32"),
        ({"a": torch.full((2, 3), math.nan)}, "a 2 -> nan"),
    ],
    ids=["last bit", "shape", "dtype", "another tensor", "nan"],
)
def test_another_adapter_is_told_by_its_tensor(
    pair: tuple[RunDir, RunDir], tensors: dict[str, torch.Tensor], told: str
) -> None:
    change_weights(pair[1], "final", **tensors)
    (found,) = compared(pair).differences
    assert str(found) == f"step 4: weights final: {told}"


def test_tensors_are_compared_to_the_bit(pair: tuple[RunDir, RunDir]) -> None:
    nan, zero = torch.tensor([math.nan, 0.0]), torch.tensor([math.nan, -0.0])
    for run in pair:
        change_weights(run, "final", c=nan)
    assert compared(pair).differences == []
    change_weights(pair[1], "final", c=zero)
    (found,) = compared(pair).differences
    assert found.size == 0
    assert (
        compared(pair)
        .verdict(0.0)
        .startswith("equal within 0 (largest difference: step 4, weights final: c)")
    )


def test_a_policy_that_is_missing_or_damaged_is_a_difference(pair: tuple[RunDir, RunDir]) -> None:
    file = pair[1].adapter / "final" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    assert [str(found) for found in compared(pair).differences] == [
        "step 4: weights final 2 tensors -> unreadable"
    ]
    file.unlink()
    assert [str(found) for found in compared(pair).differences] == [
        "step 4: weights final 2 tensors -> absent"
    ]


def test_only_what_is_up_to_the_last_step_is_compared(pair: tuple[RunDir, RunDir]) -> None:
    change_row(pair[1], 3, reward=0.0)
    pair[1].eval_samples(4).unlink()
    found = compared(pair, last=2, weights=False)
    assert found.differences == []
    assert found.verdict(0.0) == "identical: 3 rows of metrics, 12 completions, no weights"


def test_at_one_step_metrics_come_before_samples_and_weights(pair: tuple[RunDir, RunDir]) -> None:
    change_weights(pair[1], "best", a=torch.zeros(2, 3))
    frame = pd.read_parquet(pair[1].eval_samples(2))
    frame.assign(reward=2.0).to_parquet(pair[1].eval_samples(2))
    change_row(pair[1], 2, reward=0.0)
    assert [found.what.split()[0] for found in compared(pair).differences] == [
        "reward",
        *["sample"] * 6,
        "weights",
    ]


def test_a_difference_that_is_no_number_is_beyond_every_tolerance() -> None:
    found = RunComparison([RunDifference(1, "samples", "a", "b")], 1, 0, [])
    assert found.first(1e300) is not None
