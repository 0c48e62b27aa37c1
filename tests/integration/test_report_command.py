from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from harness import report
from harness.core.errors import UserError
from harness.core.paths import PROJECT
from tests.unit.analysis.synthetic import Trial, example, params, write_run, write_sweep


def test_a_sweep_gets_its_report_and_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, example())
    assert report.main([str(path)]) == 0
    answer, where = capsys.readouterr().out.splitlines()
    assert answer.startswith(
        "Of 4 configurations, rank 8, alpha 32, learning rate 1e-3, target modules all-linear won"
    )
    assert where == f"report: {path / 'report' / 'index.html'}"
    assert (path / "report" / "report.md").is_file()
    assert len(pd.read_parquet(path / "results.parquet")) == 12


def test_a_run_gets_a_report_in_the_requested_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    assert report.main([str(path), "--output", str(tmp_path / "elsewhere")]) == 0
    assert "held-out accuracy 0.900" in capsys.readouterr().out
    assert (tmp_path / "elsewhere" / "index.html").is_file()
    assert not (path / "report").exists()
    assert not (path / "results.parquet").exists()


@pytest.mark.slow
def test_a_report_is_rebuilt_in_place_from_its_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    assert report.main([str(path)]) == 0
    page = path / "report" / "index.html"
    before = page.read_bytes()
    page.unlink()
    capsys.readouterr()
    assert report.main([str(path / "report" / "tables")]) == 0
    assert page.read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {page}"


@pytest.mark.slow
def test_several_sweeps_are_compared_on_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9), "first")
    second = write_run(tmp_path, Trial(0, 0, params(1, 1e-3), 0.8), "second")
    assert report.main(["--compare", str(first), str(second)]) == 0
    output = capsys.readouterr().out
    assert "first: Rank 8" in output
    assert "second: Rank 1" in output
    assert f"report: {tmp_path / 'comparison' / 'index.html'}" in output
    with pytest.raises(UserError, match="puts several sweeps or runs on one page"):
        report.main(["--compare", str(first)])


@pytest.mark.slow
def test_watching_a_finished_run_writes_one_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    assert report.main([str(path), "--watch"]) == 0
    assert (path / "report" / "index.html").is_file()
    with pytest.raises(UserError, match="every so many seconds"):
        report.main([str(path), "--watch", "0"])


def test_a_mistyped_directory_lists_existing_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs", Trial(0, 0, params(8, 1e-3), 0.9), name="quickstart")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        report.main(["runs/quikstart"])
    assert caught.value.allowed == "runs/quickstart"
    assert caught.value.fix == "did you mean runs/quickstart?"
    with pytest.raises(UserError) as caught:
        report.main(["runs"])
    assert caught.value.allowed == "runs/quickstart"


def test_bad_input_exits_2_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness.report", "nowhere"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: not a run or sweep: there is no manifest.json")
    assert "Traceback" not in done.stderr


def test_no_deep_learning_stack_is_loaded(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    code = (
        "import sys; from harness.report import main; main(sys.argv[1:])\n"
        "print(sorted({'torch', 'vllm', 'ray', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
