"""Run the GPU measurements on a CPU with tiny sizes, section by section."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.core.paths import PROJECT
from tests.gpu import measure

QUICK = ("card", "update", "close", "learns_float32")


def stage(out: Path, number: int, *options: str) -> dict[str, Any]:
    """Run a stage with `--device cpu` and return its record.

    Every section must be complete.
    """
    command = [
        sys.executable,
        "-m",
        "tests.gpu.measure",
        "--stage",
        str(number),
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, *options], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    record: dict[str, Any] = json.loads((out / f"stage{number}.json").read_text())
    bad = {
        name: row.get("why") for name, row in record["sections"].items() if row["status"] != "ok"
    }
    assert done.returncode == 0, f"{bad}\n{done.stderr[-2000:]}"
    assert not bad
    assert done.stdout.splitlines()[-1].strip()
    return record


def test_the_sections_that_matter_most_run_on_a_cpu(tmp_path: Path) -> None:
    record = stage(tmp_path, 1, "--sections", ",".join(QUICK))
    assert tuple(record["sections"]) == QUICK
    assert {"commit", "dirty", "digest"} == set(record["code"])
    assert record["packages"]["torch"]
    update = record["sections"]["update"]["seen"]["512 sequences"]
    assert update["tokens_per_second"] > 0
    assert update["tokens"] == 16 * 16 + 16 // 4 * 32
    assert record["sections"]["close"]["seen"]["ppo"]["left_after_close_mb"] < 1
    assert record["sections"]["learns_float32"]["seen"]["again"]["same_bits"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", sorted(measure.STAGES))
def test_every_section_runs_on_a_cpu(number: int, tmp_path: Path) -> None:
    record = stage(tmp_path, number)
    assert list(record["sections"]) == list(measure.STAGES[number])
    if number == 1:
        # A CPU cannot run them all.
        counts = record["sections"]["tests"]["seen"]["counts"]
        assert counts.keys() == {"passed", "skipped"}


def in_process(out: Path, scratch: Path, minutes: float, *names: str) -> dict[str, Any]:
    """Run sections of a stage in this process and return their records.

    A test may have changed their limits.
    """
    options = argparse.Namespace(
        stage=1, out=out, minutes=minutes, device="cpu", scratch=scratch, model=None, data=None
    )
    status = measure.Stage(options, list(names)).run()
    sections: dict[str, Any] = json.loads((out / "stage1.json").read_text())["sections"]
    assert status == int(any(row["status"] not in ("ok", "skipped") for row in sections.values()))
    return sections


def test_a_section_that_runs_out_of_time_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measure.STAGES[1], "update", 0)
    sections = in_process(tmp_path, tmp_path / "scratch", 1.0, "update", "card")
    assert [row["status"] for row in sections.values()] == ["timeout", "ok"]
    assert sections["card"]["seen"]["bf16_tflops"] > 0


def test_a_section_that_dies_says_why(tmp_path: Path) -> None:
    no_folder = tmp_path / "file"
    no_folder.touch()
    (row,) = in_process(tmp_path, no_folder, 1.0, "card").values()
    assert row["status"] == "died"
    assert "FileExistsError" in row["why"]


def test_sections_that_do_not_fit_are_skipped(tmp_path: Path) -> None:
    sections = in_process(tmp_path, tmp_path, 0.0, "card", "update")
    assert [row["status"] for row in sections.values()] == ["skipped", "skipped"]
