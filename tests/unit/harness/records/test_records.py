"""Run directories, manifests and metrics files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from harness.config import metrics
from harness.config import recipe as recipes
from harness.config.digest import recipe_digest
from harness.core.errors import UserError
from harness.records import manifest
from harness.records.files import write_text
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status, run_dir_for
from tests.recipes import quickstart


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    recipe = quickstart()
    run.create(
        recipes.to_yaml(recipe), manifest.build(recipe, kind="run", name="run", source="quickstart")
    )
    return run


def test_status_follows_the_state_machine(run_dir: RunDir) -> None:
    assert run_dir.status is Status.CREATED
    run_dir.move_to(Status.RUNNING)
    run_dir.move_to(Status.FAILED, reason="boom")
    run_dir.move_to(Status.RUNNING)
    run_dir.move_to(Status.COMPLETE, result={"step": 3})
    record = run_dir.read_manifest()
    assert [entry["status"] for entry in record["status_history"]] == [
        "CREATED",
        "RUNNING",
        "FAILED",
        "RUNNING",
        "COMPLETE",
    ]
    assert record["status_history"][2]["reason"] == "boom"
    assert record["reason"] is None
    assert record["result"] == {"step": 3}
    with pytest.raises(ValueError, match="COMPLETE to RUNNING"):
        run_dir.move_to(Status.RUNNING)


def test_a_sweep_that_is_complete_can_be_given_more_to_do(run_dir: RunDir) -> None:
    run_dir.update(kind="sweep")
    for status in (Status.RUNNING, Status.COMPLETE, Status.RUNNING, Status.COMPLETE):
        run_dir.move_to(status)
    with pytest.raises(ValueError, match="COMPLETE to FAILED"):
        run_dir.move_to(Status.FAILED)


def test_manifest_names_what_the_run_depends_on(run_dir: RunDir) -> None:
    record = run_dir.read_manifest()
    assert record["packages"]["torch"]
    assert record["hardware"]["cores"] >= 1
    assert record["recipe"]["digest"] == recipe_digest(quickstart())
    assert all(digest.startswith("sha256:") for digest in record["data"].values())


def test_digest_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    def digest(name: str, text: str) -> str | None:
        folder = tmp_path / f"{name}{text}"
        folder.mkdir()
        (folder / name).write_text(text)
        return manifest.digest_path(str(folder))

    assert len({digest("a", "1"), digest("a", "2"), digest("b", "1")}) == 3
    assert manifest.digest_path(str(tmp_path / "absent")) is None


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    write_text(target, "old")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_text(target, "new")
    assert target.read_text() == "old"


def test_missing_and_damaged_manifests_are_named(run_dir: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        RunDir(tmp_path / "nowhere").read_manifest()
    run_dir.manifest.write_text('{"status": ')
    with pytest.raises(UserError, match="damaged"):
        run_dir.read_manifest()


def test_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"trainer\.ckpt_path"):
        RunDir(tmp_path / "file" / "run").create("", {})


def test_place_uses_name_and_folder() -> None:
    recipe = quickstart(["trainer.run_name=mine", "trainer.ckpt_path=/tmp/there"])
    assert run_dir_for(recipe, "recipes/quickstart.yaml").path == Path("/tmp/there/mine")
    unnamed = run_dir_for(quickstart(), "recipes/quickstart.yaml").path
    assert unnamed.parent == Path.cwd() / "runs"
    assert unnamed.name.startswith("quickstart-")


def test_metrics_file_appends_reads_and_truncates(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.rows() == []
    for step in range(4):
        file.append({"step": step, "reward": step / 4, "kl": math.nan if step == 2 else 0.0})
    assert [row["step"] for row in file.rows()] == [0, 1, 2, 3]
    assert math.isnan(file.rows()[2]["kl"])
    assert json.loads(file.path.read_text().splitlines()[2])["kl"] is None
    file.truncate(1)
    assert [row["step"] for row in file.rows()] == [0, 1]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 0})
    with file.path.open("a") as stream:
        stream.write('{"step": 1, "rew')
    assert [row["step"] for row in file.rows()] == [0]
    file.truncate(5)
    file.append({"step": 1})
    assert [row["step"] for row in file.rows()] == [0, 1]


def test_unknown_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean eval/accuracy"):
        MetricsFile(tmp_path / "m.jsonl").append({"eval/acuracy": 1.0})


def test_direction_comes_from_the_definition() -> None:
    assert metrics.direction("eval/accuracy") == "maximize"
    assert metrics.direction("eval/pass@8") == "maximize"
    assert metrics.direction("step_time") == "minimize"
    with pytest.raises(UserError, match="neither direction is better"):
        metrics.direction("entropy")


def test_timings_are_what_two_equal_runs_may_differ_in() -> None:
    row = {
        "step": 1,
        "reward": 0.5,
        "step_time": 1.2,
        "timing_s/rollout": 0.4,
        "perf/tokens_per_second": 9.0,
    }
    assert metrics.without_timings(row) == {"step": 1, "reward": 0.5}


@pytest.mark.parametrize(
    ("seconds", "shown"), [(47.2, "47 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, shown: str) -> None:
    assert metrics.duration(seconds) == shown
