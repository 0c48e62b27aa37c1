"""Test what the benchmarks need of the code they measure; `make bench` runs them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.benchmarks import bench_checks, bench_update

NAMES = sorted(path.stem for path in Path(bench_checks.__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_what_it_measures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = importlib.import_module(f"tests.benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 0
    purpose = (benchmark.__doc__ or "").partition(".")[0]
    assert purpose.split() == capsys.readouterr().out.partition("\n\n")[2].partition(".")[0].split()


def test_what_the_benchmarks_replace_exists() -> None:
    with bench_checks.unchecked(), bench_update.method(False, False, False, False):
        pass
