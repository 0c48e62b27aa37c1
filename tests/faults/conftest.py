"""Fixtures of the fault tests: a warm process, an undisturbed run, and the page's table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir
from tests.faults import cases, table
from tests.faults.forks import Outcome, WarmProcess
from tests.faults.hooks import Fault

Record = Callable[[str, str, int], None]


@dataclass(frozen=True, slots=True)
class Runs:
    """Starts and resumes runs of one small recipe in the warm process."""

    warm: WarmProcess
    root: Path
    overrides: list[str]

    def start(self, name: str, *overrides: str, fault: Fault | None = None) -> Outcome:
        """Start a new run of this name."""
        location = [f"trainer.ckpt_path={self.root}", f"trainer.run_name={name}"]
        return self.warm.run(
            "harness.run",
            "recipes/quickstart.yaml",
            *self.overrides,
            *location,
            *overrides,
            directory=self.root / name,
            fault=fault,
        )

    def resume(self, run: RunDir, fault: Fault | None = None) -> Outcome:
        """Resume a run."""
        return self.warm.run(
            "harness.run", "--resume", str(run.path), directory=run.path, fault=fault
        )

    def get(self, name: str) -> RunDir:
        """Return the directory of a run."""
        return RunDir(self.root / name)


@pytest.fixture(scope="session")
def results() -> Iterator[list[tuple[str, str, int]]]:
    """Collect the outcome of every fault.

    They are written as a page at the end, if requested and complete.
    """
    outcomes: list[tuple[str, str, int]] = []
    yield outcomes
    if os.environ.get("NOREGRET_WRITE_DOCS") == "1":
        rows = table.gather(outcomes)
        missing = cases.expected().items() - {(row.fault, row.tried) for row in rows}
        assert not missing, (
            f"docs/guides/reliability.md is not written: not all was tried: {sorted(missing)}"
        )
        order = list(cases.expected())
        table.PAGE.write_text(table.page(sorted(rows, key=lambda row: order.index(row.fault))))


@pytest.fixture
def record(results: list[tuple[str, str, int]]) -> Record:
    """Return a function that records a fault's name, its outcome, and the steps it lost."""
    return lambda fault, happened, lost: results.append((fault, happened, lost))


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    """Start the process that commands are forked from."""
    process = WarmProcess(tmp_path_factory.mktemp("output"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def small(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides that make quickstart a run of seconds, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 12), ("validation", 8)):
        pd.read_parquet(tiny_model_dir / "data" / f"{name}.parquet").head(count).to_parquet(
            folder / f"{name}.parquet"
        )
    return [
        f"data.train_data=[{folder}/train.parquet]",
        f"data.val_data=[{folder}/validation.parquet]",
        "trainer.train_batch_size=2",
        "trainer.policy_mini_batch_size=1",
        "trainer.max_steps=6",
        "trainer.ckpt_interval=1",
        "trainer.max_ckpts_to_keep=2",
        "trainer.eval_interval=2",
        # With this learning rate steps 2 and 4 have the best evaluation so far, and step 6 has not.
        "trainer.policy.optimizer_config.lr=3e-3",
        "trainer.policy.optimizer_config.scheduler=cosine",
        "generator.n_samples_per_prompt=4",
        "generator.backend=transformers",
    ]


@pytest.fixture(scope="session")
def runs(warm: WarmProcess, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the object that starts and resumes small runs."""
    return Runs(warm, tmp_path_factory.mktemp("runs"), small)


@dataclass(frozen=True, slots=True)
class UndisturbedRun:
    """An undisturbed run and its CPU seconds."""

    run: RunDir
    seconds: float


@pytest.fixture(scope="session")
def undisturbed(runs: Runs) -> UndisturbedRun:
    """Train the undisturbed run."""
    outcome = runs.start("undisturbed")
    assert outcome.status == 0, outcome.output
    run = runs.get("undisturbed")
    scores = [
        row["eval/accuracy"] for row in MetricsFile(run.metrics).rows() if "eval/accuracy" in row
    ]
    assert scores[1] < scores[2] >= scores[3], (
        "the best adapter must change during the run, and not at its end"
    )
    return UndisturbedRun(run, outcome.seconds)
