"""Test a wheel built from the repository in a separate environment, away from any clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.core.paths import PROJECT

PACKAGES = ("harness", "rltrain", "sweeps", "analysis")
VERSION = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel offline from a copy, so that the repository gets no build files."""
    copy = tmp_path_factory.mktemp("build") / "project"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, copy)
    for name in (*PACKAGES, "recipes", "tests", "requirements"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an environment with the wheel; its other packages are those of this environment."""
    pytest.importorskip("ensurepip", reason="this Python cannot make environments with pip")
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, symlinks=True, with_pip=True)
    offline = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", *offline, wheel],
        env=clean_environment() | {"PIP_CONFIG_FILE": os.devnull},
        check=True,
    )
    # Python adds the folder that a .pth file names, and reads no .pth file in it. The clone is
    # installed by one, so it stays out.
    (site_packages(folder) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def site_packages(environment: Path) -> Path:
    (packages,) = (environment / "lib").glob("python*/site-packages")
    return packages


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def start(environment: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in `cwd`."""
    program, *rest = arguments
    return subprocess.run(
        [environment / "bin" / program, *rest],
        cwd=cwd,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def tracked(folders: Sequence[str]) -> set[str]:
    """Return tracked source and data files under `folders`."""
    return {
        str(file.relative_to(PROJECT))
        for folder in folders
        for file in (PROJECT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_wheel_has_code_recipes_and_assets_but_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == tracked([*PACKAGES, "recipes"])
    (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
    assert f"{Path(record).parent}/licenses/LICENSE" in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "quickstart", "--dry-run"], "sweep of quickstart"),
        (
            ["run", "recipes/gsm8k_lora.yaml", "--dry-run"],
            "data still to be prepared (noregret prepare)",
        ),
        (["--version"], f"noregret {VERSION}"),
        ([], "usage: noregret COMMAND"),
    ],
)
def test_the_console_script_works_in_an_empty_folder(
    environment: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = start(environment, tmp_path, "noregret", *arguments)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quikstart"], "did you mean recipes/quickstart.yaml?"),
        (["sweep", "--resume", "quickstart"], "which sweep of this recipe is to be resumed?"),
    ],
)
def test_errors_equal_those_of_a_clone(
    environment: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = start(environment, tmp_path, "noregret", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_manifest_ignores_other_repositories(environment: Path, tmp_path: Path) -> None:
    """Check this even for a repository that contains site-packages."""
    site = site_packages(environment)
    who = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", site, *command], check=True)
    ask = (
        "import json; from harness.config import recipe\n"
        "from harness.core import machine\nfrom harness.records import manifest\n"
        "made = manifest.build(recipe.load('quickstart'), kind='run', name='x', "
        "source='quickstart')\n"
        "print(json.dumps([machine.__file__, made]))"
    )
    done = start(environment, tmp_path, "python", "-c", ask)
    assert done.returncode == 0, done.stderr
    file, made = json.loads(done.stdout)
    assert Path(file).is_relative_to(site)
    assert made["git"] is None
    assert made["code"]["noregret"].startswith("sha256:")
    assert made["model"]["digest"] is not None
    assert {"torch", "numpy"} <= made["packages"].keys()
