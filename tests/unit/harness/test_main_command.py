"""`noregret`: its list of commands, its errors, and what a command started by it says and
records.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from harness import main
from harness.core.errors import UserError
from harness.core.paths import PROJECT
from harness.records import manifest


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script, as an installer writes it from pyproject.toml."""
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["noregret"].partition(":")
    file = tmp_path_factory.mktemp("bin") / "noregret"
    file.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return file


def noregret(
    script: Path, *arguments: str, trace: bool = False
) -> subprocess.CompletedProcess[str]:
    options = ["-X", "importtime"] if trace else []
    return subprocess.run(
        [sys.executable, *options, str(script), *arguments],
        cwd=script.parent,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_it_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(arguments) == 0
    listed = [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")
    ]
    commands = {
        file.stem
        for file in (PROJECT / "harness").glob("*.py")
        if "\n    run_command(main)" in file.read_text()
    }
    assert set(listed) == commands - {"main"}


def test_listing_the_commands_imports_only_pythons_own_library(script: Path) -> None:
    done = noregret(script, trace=True)
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    # What an environment's own .pth files import is not ours.
    plain = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", ""], capture_output=True, text=True, check=True
    )
    imported -= {
        line.rsplit("|", 1)[-1].strip().split(".")[0] for line in plain.stderr.splitlines()
    }
    assert imported - sys.stdlib_module_names == {"harness"}


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("swep", "did you mean noregret sweep?"),
        ("reprot", "did you mean noregret report?"),
        ("quickstart", "see: noregret --help"),
        ("--resume", "see: noregret --help"),
    ],
)
def test_an_unknown_command_is_explained(given: str, fix: str) -> None:
    with pytest.raises(UserError, match="no such command") as caught:
        main.main([given])
    error = caught.value
    assert (error.got, error.fix) == (given, fix)
    assert error.allowed == "run, sweep, report, prepare, reproduce, check, evaluate, export"


def test_errors_exit_2_without_a_traceback(script: Path) -> None:
    done = noregret(script, "swep")
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.splitlines()[0] == "error: no such command"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "hint"),
    [
        ("sweep", ["--help"], "usage: {} ["),
        ("sweep", ["--dryrun"], "see: {} --help"),
        ("sweep", [], "fix:     {} recipes/quickstart.yaml"),
        ("sweep", ["--resume"], "fix:     {} --resume runs/NAME"),
        ("run", [], "fix:     {} recipes/quickstart.yaml"),
        ("run", ["--resume", "runs/x", "seed=1"], "fix:     {} --resume"),
        ("prepare", ["gsm8k"], "see: {} gsm8k --help"),
        ("report", [], "see: {} --help"),
        ("reproduce", [], "see: {} --help"),
        ("check", [], "see: {} --help"),
        ("export", [], "see: {} --help"),
    ],
)
def test_help_and_hints_name_what_was_typed(
    command: str,
    arguments: list[str],
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for start, typed in (
        ("/somewhere/bin/noregret", f"noregret {command}"),
        (f"/somewhere/harness/{command}.py", f"python -m harness.{command}"),
    ):
        monkeypatch.setattr(sys, "argv", [start])
        with pytest.raises((UserError, SystemExit)) as caught:
            main.main([command, *arguments])
        told = f"{capsys.readouterr().out}{caught.value}"
        assert hint.format(typed) in told
        assert ("python -m" in told) == typed.startswith("python -m")


def test_the_recorded_command_is_one_that_works_without_the_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/noregret", "run", "quickstart", "seed=1"])
    assert manifest.this_command() == ["python", "-m", "harness.run", "quickstart", "seed=1"]


def test_it_finds_an_environment_in_the_working_directory(script: Path) -> None:
    (script.parent / "own_task").mkdir()
    (script.parent / "own_task" / "words.py").write_text(
        "def reward(completion, ground_truth): return 1.0\ndef prepare(source, "
        "output_dir): return {'train': 3}\n"
    )
    done = noregret(script, "prepare", "own_task.words", "--output-dir", "out")
    assert (done.returncode, done.stdout) == (0, "out/train.parquet: 3 problems\n"), done.stderr
