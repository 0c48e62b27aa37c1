"""`python -m harness.sweep`: its arguments, its dry run, its errors; the sweep itself is in
tests/integration.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness import sweep
from harness.core.errors import UserError
from harness.core.paths import PROJECT
from tests.unit.sweeps.curves import RANK


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "harness.sweep", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )


def test_bad_input_exits_2_without_a_traceback() -> None:
    done = command("quickstart", f"sweep.space.{RANK}.choices=[1,9999]")
    assert done.returncode == 2
    assert "cannot be 9999" in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no recipe was given"),
        (["--dry-run"], "no recipe was given"),
        (["recipes/quickstrat.yaml", "--dry-run"], "did you mean recipes/quickstart.yaml?"),
        (["quickstart", "gsm8k_lora"], "one recipe at a time"),
        (["quickstart", "--dry-run", "--resume"], "leave out one"),
        (["quickstart", "--dryrun"], "--dryrun"),
        (["quickstart", "--confirm", "0"], "--confirm is the number"),
        (["--confirm", "quickstart"], "invalid int value"),
        (["--resume"], "which sweep"),
        (["--resume", "runs/there-is-no-such-sweep"], "no manifest.json"),
        (["quickstart", "--dry-run", f"{RANK}=-1"], "out of range"),
        (
            ["quickstart", "--dry-run", "--gpu-memory", "80"],
            "names GPUs for a recipe that uses none",
        ),
        (["gsm8k_lora", "--dry-run", "--gpu-memory", "much"], "--gpu-memory cannot be read"),
        (["gsm8k_lora", "--gpu-memory", "80"], "--gpu-memory is for --dry-run"),
        (["base", "--dry-run", "trainer.policy.model.path=rltrain"], "sweeps nothing"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep.main(arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "recipe", "overrides", "resume"),
    [
        (["a.yaml", "x=1"], "a.yaml", ["x=1"], None),
        (["x=1", "a.yaml", "y=2"], "a.yaml", ["x=1", "y=2"], None),
        (["a.yaml", "--resume"], "a.yaml", [], ""),
        (["--resume", "a.yaml", "x=1"], "a.yaml", ["x=1"], ""),
        (["a.yaml", "--resume", "x=1"], "a.yaml", ["x=1"], ""),
        (["--resume", "quickstart", "x=1"], "quickstart", ["x=1"], ""),
        (["--resume", "runs/a", "x=1"], None, ["x=1"], "runs/a"),
        (["--resume", "HERE", "x=1"], None, ["x=1"], "HERE"),
    ],
)
def test_recipe_overrides_and_directory_in_any_order(
    arguments: list[str],
    recipe: str | None,
    overrides: list[str],
    resume: str | None,
    tmp_path: Path,
) -> None:
    here = str(tmp_path / "a=b.yaml")
    Path(here).mkdir()
    options = sweep.parse([here if word == "HERE" else word for word in arguments])
    assert (options.recipe, options.overrides) == (recipe, overrides)
    assert options.resume == (here if resume == "HERE" else resume)


def test_a_dry_run_plans_for_gpus_that_are_not_here() -> None:
    done = command("gsm8k_lora", "--dry-run", "--gpu-memory", "8x80")
    assert (done.returncode, done.stderr) == (0, "")
    assert "24 at a time in 8 packs of 3 on one base" in done.stdout
    assert "memory of a pack of 3 runs, GiB on the GPU" in done.stdout
    large = "trainer.policy.model.path=Qwen/Qwen2.5-32B"
    refused = command("gsm8k_lora", "--dry-run", "--gpu-memory", "1x24", large)
    assert refused.returncode == 2
    assert "does not fit the GPUs" in refused.stderr
