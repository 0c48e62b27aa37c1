"""The lock, the pins and the import contracts agree with pyproject.toml and with the source tree."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness.paths import PROJECT
from requirements import check_install, lock_cpu

PYPROJECT: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def pins(name: str) -> dict[str, Requirement]:
    """The requirements in a file of requirements/, by canonical name."""
    lines = (PROJECT / "requirements" / name).read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def version(pin: Requirement) -> str:
    """The version an `==` pin names; fails the test on anything looser."""
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert "*" not in specifier.version
    return specifier.version


def declared(*extras: str) -> list[Requirement]:
    project = PYPROJECT["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize(("lock", "extras"), [("cpu.txt", ("cpu", "dev")), ("gpu.txt", ("gpu",))])
def test_pins_satisfy_every_direct_dependency(lock: str, extras: tuple[str, ...]) -> None:
    locked = pins(lock)
    for requirement in declared(*extras):
        assert requirement.specifier.contains(version(locked[canonicalize_name(requirement.name)])), requirement


def test_cpu_lock_is_fully_pinned_and_free_of_cuda_builds() -> None:
    locked = pins("cpu.txt")
    assert all(version(pin) for pin in locked.values())
    assert not locked.keys() & lock_cpu.EXCLUDED
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-"))]


def test_lock_follows_extras_and_markers_but_not_excluded_packages() -> None:
    report: lock_cpu.Report = {
        "engine": {"requires_dist": ["web[fast]", "triton", "other-system; sys_platform == 'none'"]},
        "web": {"requires_dist": ["loop; extra == 'fast'", "docs; extra == 'docs'"]},
        "loop": {},
        "docs": {},
        "triton": {"requires_dist": ["cuda-only"]},
        "cuda-only": {},
    }
    assert lock_cpu.reachable([Requirement("engine")], report) == {"engine", "web", "loop"}


def test_check_reports_missing_and_other_versions(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"# comment\npytest=={pytest.__version__}\nnumpy==0.0.1\nno-such-distribution==1.0\n")
    found = check_install.differences(lock)
    assert len(found) == 2
    assert found[0].startswith("numpy==0.0.1: ")
    assert found[1] == "no-such-distribution==1.0: not installed"


def test_failed_install_says_why_and_leaves_no_stamp(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path / name)
    shutil.copytree(PROJECT / "requirements", tmp_path / "requirements")
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    os.utime(stamp, (0, 0))  # older than the lock
    python = Path(sys.base_prefix) / "bin" / "python3.11"  # not the venv's own, which would nest environments
    no_packages = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    result = subprocess.run(
        ["make", "install", f"PYTHON={python}"],
        cwd=tmp_path,
        env={**os.environ, **no_packages},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "No matching distribution found" in result.stderr
    assert not stamp.exists()


def test_import_contracts_cover_every_harness_module() -> None:
    contracts = {contract["id"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
    commands, *_, records = (
        {name.strip(" ()") for name in layer.split(":")} for layer in contracts["layers"]["layers"]
    )
    modules = {f"harness.{path.stem}" for path in (PROJECT / "harness").glob("*.py") if path.stem != "__init__"}
    assert not modules - commands - records, "name these in the layers contract of pyproject.toml"
    assert records - set(contracts["light-path"]["source_modules"]) == set(), "name these in its light-path contract"


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a source file imports, anywhere in it; relative imports left out."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.split(".")[0] for name in names}


def test_every_imported_package_is_a_declared_dependency() -> None:
    distributions = packages_distributions()
    allowed = {canonicalize_name(requirement.name) for requirement in declared("cpu", "gpu", "dev")}
    ours = {"harness", "rltrain", "sweeps", "analysis", "tests", "requirements"}
    undeclared = {
        f"{path.relative_to(PROJECT)}: {name}"
        for folder in ours
        for path in (PROJECT / folder).rglob("*.py")
        for name in imported(path) - sys.stdlib_module_names - ours
        if not allowed & {canonicalize_name(distribution) for distribution in distributions.get(name, [])}
    }
    assert not undeclared
