"""`harness.reproduce` and `harness.run --from` with bad input: one message, exit 2, nothing heavy,
nothing written.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from harness import reproduce, run
from harness.config import recipe as recipes
from harness.core.errors import UserError
from harness.core.paths import PROJECT
from harness.records import manifest, rerun
from harness.records.files import seal, write_json
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from rltrain.tools import compare
from rltrain.tools import reproduce as planning
from tests.recipes import quickstart

HEAVY = {"torch", "vllm", "ray", "transformers", "peft"}
MakeRun = Callable[..., RunDir]


@pytest.fixture
def made(tmp_path: Path, tiny_model_dir: Path) -> MakeRun:
    """A run of one logged step, on data of its own."""

    def make(*overrides: str, name: str = "run", kind: str = "run") -> RunDir:
        data = tmp_path / "train.parquet"
        if not data.exists():
            shutil.copy(tiny_model_dir / "data" / "train.parquet", data)
        recipe = quickstart([f"data.train_data=[{data}]", "trainer.num_threads=1", *overrides])
        recipe.sweep = None
        run_dir = RunDir(tmp_path / name)
        run_dir.create(
            recipes.to_yaml(recipe),
            manifest.build(recipe, kind=kind, name=name, source="quickstart"),
        )
        run_dir.move_to(Status.RUNNING)
        MetricsFile(run_dir.metrics).append({"step": 1, "reward": 0.5})
        return run_dir

    return make


def refused(*arguments: str) -> str:
    """The command's message; it ended with exit status 2 and imported nothing heavy."""
    command = [sys.executable, "-X", "importtime", "-m", "harness.reproduce", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    lines = done.stderr.splitlines()
    message = "\n".join(line for line in lines if not line.startswith("import time:"))
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in lines if line.startswith("import time:")
    }
    assert (done.returncode, imported & HEAVY) == (2, set()), message
    assert "Traceback" not in message
    return message


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_command_with_bad_input_exits_2_at_once(made: MakeRun, tmp_path: Path) -> None:
    assert "not a run directory" in refused("recipes")
    assert "the following arguments are required: RUN_DIR" in refused()
    assert "--tolerance is a difference" in refused(str(made().path), "--tolerance", "-1")
    Path(recipes.read(made().recipe).data.train_data[0]).unlink()
    before = tree(tmp_path)
    assert "train.parquet" in refused(str(tmp_path / "run"), "--output", str(tmp_path / "again"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", ["nan", "inf", "-0.1", "much"])
def test_a_tolerance_is_a_number_from_zero(made: MakeRun, value: str) -> None:
    with pytest.raises(UserError, match="tolerance"):
        reproduce.main([str(made().path), f"--tolerance={value}"])


def test_a_sweep_is_refused_with_its_trials(made: MakeRun, tmp_path: Path) -> None:
    sweep = made(name="sweep", kind="sweep")
    with pytest.raises(UserError, match="it has no trials yet"):
        reproduce.main([str(sweep.path)])
    made(name="sweep/trials/0002", kind="trial")
    with pytest.raises(
        UserError, match=r"this directory holds a sweep[\s\S]*name a trial: .*sweep/trials/0002"
    ):
        reproduce.main([str(sweep.path)])


def test_a_run_without_a_step_an_output_that_exists(made: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the output exists already"):
        reproduce.main([str(made().path), "--output", str(tmp_path)])
    RunDir(tmp_path / "run").metrics.unlink()
    with pytest.raises(UserError, match="logged no step"):
        reproduce.main([str(tmp_path / "run")])
    RunDir(tmp_path / "run").recipe.unlink()
    with pytest.raises(UserError, match="cannot read a run's recipe"):
        run.main(["--from", str(tmp_path / "run")])


def test_a_model_or_checkpoint_that_is_gone(
    made: MakeRun, tmp_path: Path, tiny_model_dir: Path
) -> None:
    model, start = tmp_path / "model", tmp_path / "other" / "step_000001"
    shutil.copytree(tiny_model_dir, model, ignore=shutil.ignore_patterns("data"))
    start.mkdir(parents=True)
    (start / "state.json").write_text("{}")
    seal(start)
    source = made(f"trainer.policy.model.path={model}", f"trainer.resume_mode={start}")
    assert reproduce.main([str(source.path), "--check-only"]) in (0, 1)
    (start / "state.json").write_text("")
    with pytest.raises(UserError, match="cannot be used\n.*state.json is damaged"):
        reproduce.main([str(source.path), "--check-only"])
    shutil.rmtree(start)
    with pytest.raises(UserError, match="resume_mode names no whole checkpoint"):
        reproduce.main([str(source.path), "--check-only"])
    shutil.rmtree(model)
    with pytest.raises(UserError, match=r"trainer\.policy\.model\.path names no folder"):
        reproduce.main([str(source.path), "--output", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_check_only_says_what_differs_and_trains_nothing(
    made: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made()
    before = tree(tmp_path)
    reproduce.main([str(source.path), "--check-only"])
    assert "same: recipe" in capsys.readouterr().out
    assert tree(tmp_path) == before

    record: dict[str, Any] = json.loads(source.manifest.read_text())
    record["dependencies"]["tqdm"] = "0.0.1"
    record["resumed"] = [
        {"time": "2026-01-01T00:00:00Z", "command": [], "different": ["python: 3.10 -> 3.11"]}
    ]
    del record["hardware"]
    write_json(source.manifest, record)
    data = Path(recipes.read(source.recipe).data.train_data[0])
    pd.read_parquet(data).iloc[::-1].to_parquet(data)
    assert reproduce.main([str(source.path), "--check-only"]) == 1
    said = capsys.readouterr().out
    assert "differs: tqdm: 0.0.1 -> " in said
    assert f"differs: data {data}: sha256:" in said
    assert "not recorded: hardware" in said
    assert "differed when it was resumed at 2026-01-01T00:00:00Z: python: 3.10 -> 3.11" in said


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected", "hint"),
    [
        (["trainer.placement.device=auto"], ["NVIDIA H100"], "deterministic: false", True),
        (
            ["trainer.placement.device=auto", "deterministic=true"],
            ["NVIDIA H100"],
            "deterministic: true",
            False,
        ),
        (["trainer.placement.device=cpu"], ["NVIDIA H100"], None, False),
        (["trainer.placement.device=auto"], [], None, False),
    ],
)
def test_what_can_be_expected_on_a_gpu(
    made: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    gpus: list[str],
    expected: str | None,
    hint: bool,
) -> None:
    source = made(*overrides)
    record: dict[str, Any] = json.loads(source.manifest.read_text())
    record["hardware"]["gpus"] = gpus
    write_json(source.manifest, record)
    planned = planning.plan(source.path, tmp_path / "again")
    reproduce._print_agreement(planned)
    said = capsys.readouterr().out
    assert ("on a GPU: " in said) is (expected is not None)
    assert expected is None or f"on a GPU: its recipe has {expected}, so the same" in said
    planning.begin(planned)
    departs = SimpleNamespace(
        verdict=lambda tolerance: "departs at step 1", first=lambda tolerance: object()
    )
    monkeypatch.setattr(compare, "compare", lambda *_, **__: departs)
    assert reproduce._conclude(planned, 1, 0.0) == reproduce.DEPARTS
    said = capsys.readouterr().out
    assert ("this run was not deterministic: its recipe has deterministic: false" in said) is hint
    assert said.splitlines()[-1].startswith("departs at step 1  ")


def test_another_recipe_than_the_manifests_is_named(
    made: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made()
    source.recipe.write_text(
        recipes.to_yaml(recipes.with_values(recipes.read(source.recipe), {"seed": 1}))
    )
    assert reproduce.main([str(source.path), "--check-only"]) == 1
    assert "differs: recipe: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"kind": 3, "recipe": []}'])
def test_a_manifest_of_nonsense_is_refused(made: MakeRun, text: str) -> None:
    source = made()
    source.manifest.write_text(text)
    for command, arguments in ((reproduce.main, []), (run.main, ["--from"])):
        with pytest.raises(UserError, match="the manifest is damaged"):
            command([*arguments, str(source.path)])


def test_a_new_run_takes_name_and_place_of_its_own(made: MakeRun) -> None:
    for name, wanted in [
        ("run-20260102-030405", "run"),
        ("mine", "mine"),
        ("sweep/trials/0003", "sweep-0003"),
    ]:
        source, overrides, start = rerun.new_run_from(
            made("trainer.resume_mode=none", name=name).path
        )
        recipe = recipes.load(source, overrides)
        assert start == wanted
        assert (recipe.trainer.run_name, recipe.trainer.ckpt_path, recipe.trainer.resume_mode) == (
            None,
            "runs",
            "latest",
        )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["recipes/quickstart.yaml"], "recipes/quickstart.yaml"),
        (["--resume", "runs/x"], "--resume"),
        (["fast"], "fast"),
    ],
)
def test_from_takes_overrides_alone(made: MakeRun, arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=rf"--from takes its recipe from a run\n  got:     {told}"):
        run.main(["--from", str(made().path), *arguments])


def test_from_is_shown_before_it_starts(made: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--from", str(made("seed=7").path), "trainer.max_steps=3", "--dry-run"]) == 0
    assert "steps               3" in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean trainer.max_steps"):
        run.main(["--from", str(made().path), "trainer.max_step=3", "--dry-run"])
