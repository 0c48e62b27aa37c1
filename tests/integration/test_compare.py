from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.data.tables import load
from analysis.report import compare
from analysis.report.verdicts import claim_table
from analysis.report.write import read, write
from tests.unit.analysis.synthetic import Sweep, Trial, params, write_sweep


@pytest.fixture
def two_sweeps(tmp_path: Path) -> tuple[Path, Path]:
    """Return two sweeps on the same problems; the first has the higher score."""
    made = []
    for name, rank, top in (("first", 8, 0.9), ("second", 1, 0.7)):
        trials = [
            Trial(i, s, params(rank, lr), score)
            for i, (lr, score) in enumerate(((1e-4, 0.4), (1e-3, top), (1e-2, 0.35)))
            for s in (0, 1)
        ]
        made.append(write_sweep(tmp_path, Sweep(trials), name))
    return made[0], made[1]


def answer(sweep: Path, wrong: dict[int, list[int]]) -> None:
    """Make the winner's last evaluation answer these problems wrong, by trial number."""
    for number, indices in wrong.items():
        file = sweep / "trials" / f"{number:04d}" / "samples" / "step_000050.parquet"
        rows = pd.read_parquet(file)
        rows.loc[rows["index"].isin(indices), "reward"] = 0.0
        rows.to_parquet(file)


def test_best_trials_are_compared_problem_by_problem(two_sweeps: tuple[Path, Path]) -> None:
    answer(two_sweeps[1], {2: [0, 1, 2, 3, 4, 5], 3: [0, 1, 2, 3, 4, 6]})
    experiments = read(two_sweeps)
    table = compare.best_of_each(experiments)
    assert [row.best for row in table.rows] == [True, False]
    assert [row.cells[0] for row in table.rows] == ["first", "second"]
    assert "rank 8" in table.rows[0].cells[1]
    [pair] = compare.pairs(experiments)
    assert (pair.first, pair.second, pair.problems, pair.seeds) == ("first", "second", 8, 2)
    assert pair.difference == "+0.750 reward", "6 of 8 problems on either seed"
    assert pair.verdict == "better"


def test_a_higher_score_without_support_from_the_shared_problems_is_not_better(
    two_sweeps: tuple[Path, Path],
) -> None:
    answer(two_sweeps[1], {2: [0], 3: []})
    [pair] = compare.pairs(read(two_sweeps))
    assert pair.verdict == "cannot tell"


def test_sweeps_on_different_problems_are_not_compared(two_sweeps: tuple[Path, Path]) -> None:
    for file in two_sweeps[1].glob("trials/*/samples/*.parquet"):
        rows = pd.read_parquet(file)
        rows["question"] = "another " + rows["question"]
        rows.to_parquet(file)
    [pair] = compare.pairs(read(two_sweeps))
    assert (pair.verdict, pair.difference) == ("not comparable", "")


def test_sweeps_on_different_metrics_are_not_compared(
    two_sweeps: tuple[Path, Path], tmp_path: Path
) -> None:
    trials = [Trial(0, 0, params(8, 1e-3), 0.1), Trial(1, 0, params(8, 1e-2), 0.2)]
    loss = write_sweep(
        tmp_path, Sweep(trials, seeds=[0], metric="completions/clipped_ratio"), "loss"
    )
    compared = compare.pairs(read([two_sweeps[0], loss]))
    assert [pair.verdict for pair in compared] == ["not comparable"]
    assert "is judged by" in compared[0].reading


def test_a_comparison_page_can_be_rebuilt_from_its_tables(
    two_sweeps: tuple[Path, Path], tmp_path: Path
) -> None:
    page = write(read(two_sweeps), tmp_path / "one").path
    text = page.read_text()
    assert text.count("won: held-out accuracy") == 2
    assert {"first", "second"} <= {
        word.strip(":") for word in (tmp_path / "one" / "report.md").read_text().split()
    }
    again = write(read([tmp_path / "one" / "tables"]), tmp_path / "two").path
    assert again.read_bytes() == page.read_bytes()
    for name in (
        "report.md",
        "trials.csv",
        "tables/runs.parquet",
        "tables/samples.parquet",
        "tables/steps.parquet",
    ):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), (
            name
        )


def test_claims_are_judged_on_all_runs_together(two_sweeps: tuple[Path, Path]) -> None:
    experiments = read(two_sweeps)
    together, alone = claim_table(experiments), claim_table(experiments[:1])
    assert together is not None
    assert alone is not None
    assert "12 runs" in together.note
    assert "6 runs" in alone.note
    assert len(together.rows) == len(alone.rows)
    assert sum(count for _, count in together.counts) == len(together.rows)
    unknown = [row for row in together.rows if row.verdict == "cannot tell" and not row.effect]
    assert unknown
    assert all(
        row.command is None or row.command.startswith("python -m harness.sweep ")
        for row in together.rows
    )


def test_sweeps_of_the_same_name_are_shown_by_directory(
    two_sweeps: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_sweep(
        tmp_path / "elsewhere", Sweep([Trial(0, 0, params(8, 1e-3), 0.9)], seeds=[0]), "first"
    )
    assert (
        compare.unique_names(read([two_sweeps[0], other]))
        == load([two_sweeps[0], other]).sources["directory"].tolist()
    )
