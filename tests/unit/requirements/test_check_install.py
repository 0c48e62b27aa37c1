"""The check of a machine with a GPU names each thing that is missing, what is needed and what to
do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from requirements import check_install


@pytest.fixture
def facts(tmp_path: Path) -> check_install.Facts:
    """A machine on which a run on a GPU works."""
    header = tmp_path / "Python.h"
    header.touch()
    return check_install.Facts(
        cuda="13.0",
        architectures=["sm_75", "sm_80", "sm_90", "sm_120"],
        driver="580.65.06",
        cards=[("NVIDIA H100 80GB HBM3", "9.0")],
        visible=True,
        compiler="/usr/bin/gcc",
        header=header,
        free=100.0,
    )


def wrong(facts: check_install.Facts) -> list[str]:
    return [finding.what for finding in check_install.gpu_findings(facts) if finding.fix]


def test_machine_with_all_that_a_gpu_run_needs_passes(facts: check_install.Facts) -> None:
    assert not wrong(facts)
    lines = [str(finding) for finding in check_install.gpu_findings(facts)]
    assert "ok       driver: 580.65.06" in lines
    assert "ok       GPU: NVIDIA H100 80GB HBM3, 9.0" in lines


@pytest.mark.parametrize(
    ("changes", "found", "line"),
    [
        (
            {"driver": "570.86.15"},
            ["driver"],
            "driver: 570.86.15; needed: NVIDIA's 580 or newer for CUDA 13.0",
        ),
        ({"cuda": None}, ["torch"], "torch: built for a CPU; needed: a build for CUDA"),
        (
            {"cards": [("Tesla V100", "7.0")]},
            ["GPU"],
            "GPU: Tesla V100, 7.0; needed: compute capability 7.5 or",
        ),
        ({"visible": False}, ["torch"], "torch: sees no GPU"),
        ({"compiler": None}, ["C compiler"], "C compiler: none; needed: one for Triton"),
        (
            {"header": Path("/nowhere/Python.h")},
            ["Python.h"],
            "Python.h: not in /nowhere; needed: Python's headers",
        ),
        ({"free": 3.0}, ["disk"], "disk: 3 GB free; needed: 10 GB"),
    ],
)
def test_each_thing_amiss_is_named_with_what_is_needed(
    facts: check_install.Facts, changes: dict[str, Any], found: list[str], line: str
) -> None:
    changed = replace(facts, **changes)
    assert wrong(changed) == found
    (said,) = [str(finding) for finding in check_install.gpu_findings(changed) if finding.fix]
    assert said.startswith(f"MISSING  {line}")
    assert "; fix: " in said


def test_older_cuda_asks_for_an_older_driver(facts: check_install.Facts) -> None:
    assert not wrong(replace(facts, cuda="12.8", driver="535.54"))


def test_without_a_gpu_all_that_is_missing_is_said_at_once(facts: check_install.Facts) -> None:
    bare = replace(facts, driver=None, cards=[], visible=False, compiler=None, free=0.0)
    assert wrong(bare) == ["driver", "GPU", "C compiler", "disk"]


def test_a_gpu_that_torch_is_not_built_for_is_found_among_several(
    facts: check_install.Facts,
) -> None:
    assert wrong(replace(facts, cards=[*facts.cards, ("Tesla P100", "6.0")])) == ["GPU"]
