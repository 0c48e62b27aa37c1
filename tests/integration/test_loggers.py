"""Console, W&B and TensorBoard: what a run leaves in each, read back from their own files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness.config import recipe as recipes
from harness.core.errors import UserError
from harness.core.paths import PROJECT
from harness.loggers.loggers import Loggers
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from tests.integration.logged import (
    TensorBoardRun,
    WandBRun,
    make_run,
    recipe_of,
    row_of,
    sample,
    train,
    wandb_steps,
)

KEY = "0123456789abcdef0123456789abcdef01234567"
ESCAPE = "\x1b"


@pytest.fixture(autouse=True)
def wandb_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and no mode: a run must stay offline all the same."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def test_wandb_holds_config_group_history_table_and_adapter(tmp_path: Path) -> None:
    recipe = recipe_of("wandb")
    run_dir = make_run(tmp_path / "trial", recipe)
    (run_dir.adapter / "final").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run_dir.adapter / "final" / name).write_text(f"bytes of {name}")
    train(run_dir, recipe, range(9), 8, group="a sweep")

    kept = WandBRun(run_dir)
    (run,) = kept.all("run")
    assert (run.project, run.display_name, run.run_group) == ("proving", "trial", "a sweep")
    assert {key: kept.config[key] for key in ("seed", "trainer", "generator")} == {
        key: recipes.to_dict(recipe)[key] for key in ("seed", "trainer", "generator")
    }
    assert kept.steps == list(range(9))
    for step, row in enumerate(kept.history):
        assert row_of(step, evaluated=step % 4 == 0).items() <= row.items()
    tables = kept.tables()
    assert list(tables) == [0, 4, 8]
    assert tables[4]["columns"] == list(sample())
    assert [line[tables[4]["columns"].index("completion")] for line in tables[4]["data"]] == [
        "#### 18",
        "wrong at 4",
    ]
    (artifact,) = kept.artifacts("model")
    assert [entry.path for entry in artifact.manifest.contents] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    # The adapter's files are the run's own, and copies of the tables are in the run's folder too.
    assert all(
        Path(entry.local_path).parent == run_dir.adapter / "final"
        for entry in artifact.manifest.contents
    )
    copies = [
        Path(entry.local_path)
        for table in kept.artifacts("run_table")
        for entry in table.manifest.contents
    ]
    assert len(copies) == 3
    assert all(copy.is_relative_to(run_dir.path / "wandb") and copy.is_file() for copy in copies)
    assert json.loads(artifact.metadata)["metrics"] == {"eval/accuracy": 0.8}
    assert kept.exit_codes == [0]
    assert all(
        file.is_relative_to(run_dir.path / "wandb") and "offline" in str(file)
        for file in kept.files
    )


def test_a_run_alone_has_no_group_and_no_adapter_is_no_artifact(tmp_path: Path) -> None:
    recipe = recipe_of("wandb")
    run_dir = make_run(tmp_path / "full", recipe)
    train(run_dir, recipe, range(2), 1)
    kept = WandBRun(run_dir)
    assert kept.all("run")[0].run_group == ""
    assert not kept.artifacts("model")


@pytest.mark.parametrize(
    ("end", "code"),
    [(Status.FAILED, 1), (Status.PRUNED, 0), (Status.RUNNING, 255), (Status.COMPLETE, 0)],
)
def test_wandb_says_how_a_run_ended(tmp_path: Path, end: Status, code: int) -> None:
    recipe = recipe_of("wandb")
    run_dir = make_run(tmp_path / "run", recipe)
    with contextlib.closing(Loggers(recipe, run_dir)) as log:
        log.report(8, row_of(1))
        run_dir.move_to(end)
    kept = WandBRun(run_dir)
    assert kept.exit_codes == [code]
    updates = [
        update
        for summary in kept.all("summary")
        for update in summary.update
        if update.key == "status"
    ]
    assert [json.loads(update.value_json) for update in updates] == [end.value]


def test_two_runs_in_one_process_are_two_wandb_runs(tmp_path: Path) -> None:
    recipe = recipe_of("wandb")
    runs = [make_run(tmp_path / name, recipe) for name in ("one", "other")]
    train(runs[0], recipe, range(3), 9)
    train(runs[1], recipe, range(5), 9)
    kept = [WandBRun(run) for run in runs]
    assert [run.steps for run in kept] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert len({run.all("run")[0].run_id for run in kept}) == 2


def test_a_resumed_run_keeps_its_wandb_id_and_its_last_file_has_every_row(tmp_path: Path) -> None:
    recipe = recipe_of("wandb")
    run_dir = make_run(tmp_path / "run", recipe)
    train(run_dir, recipe, range(7), 12)
    train(run_dir, recipe, range(5, 13), 12)  # the checkpoint was at step 4
    kept = WandBRun(run_dir)
    assert len(kept.files) == 2
    assert len({run.run_id for run in kept.all("run")}) == 1
    assert kept.steps == [*range(7), *range(13)]
    assert set(kept.tables()) == {0, 4, 8, 12}
    assert kept.exit_codes == [255, 0]


# W&B's own process is killed too: else it would continue to write.
KILLED = """
import os, psutil, signal, sys
sys.path.insert(0, {project!r})
from harness.config import recipe as recipes
from harness.loggers.loggers import Loggers
from harness.records.run_dir import RunDir
from tests.integration.logged import MetricsFile, row_of, sample, write_samples

run_dir = RunDir(sys.argv[1])
log = Loggers(recipes.read(run_dir.recipe), run_dir)
for step in range(160):
    row = row_of(step, evaluated=step == 100)
    if step == 100:
        write_samples(run_dir, step, sample())
    MetricsFile(run_dir.metrics).append(row)
    log.report(200, row)
for process in (*psutil.Process().children(recursive=True), psutil.Process()):
    process.send_signal(signal.SIGKILL)
"""


def test_no_row_is_missing_from_wandb_and_tensorboard_when_a_killed_run_goes_on(
    tmp_path: Path,
) -> None:
    recipe = recipe_of("wandb", "tensorboard")
    run_dir = make_run(tmp_path / "run", recipe)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(project=str(PROJECT)), run_dir.path], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(MetricsFile(run_dir.metrics).rows()) == 160

    train(run_dir, recipe, range(155, 181), 180)
    kept = WandBRun(run_dir)
    assert {row["_step"]: row["reward"] for row in kept.history} == {
        step: step / 8 for step in range(181)
    }
    assert 100 in kept.tables()
    shown = TensorBoardRun(run_dir)
    assert shown.scalars("reward") == [(step, step / 8) for step in range(181)]
    assert 100 in shown.texts()


def test_wandb_writes_to_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    recipe = recipe_of("wandb")
    run_dir = make_run(tmp_path / "run", recipe)
    with contextlib.closing(Loggers(recipe, run_dir)) as log:
        log.report(8, row_of(1))
        # By itself W&B writes every 15 seconds.
        deadline = time.monotonic() + 12
        while not (steps := wandb_steps(run_dir)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert steps == [1]


def test_tensorboard_holds_scalars_and_samples_and_hides_repeated_steps(tmp_path: Path) -> None:
    recipe = recipe_of("tensorboard")
    run_dir = make_run(tmp_path / "run", recipe)
    train(run_dir, recipe, range(8), 12)
    assert TensorBoardRun(run_dir).scalars("reward") == [(step, step / 8) for step in range(8)]
    train(run_dir, recipe, range(5, 7), 12)
    shown = TensorBoardRun(run_dir)
    assert shown.scalars("reward") == [(step, step / 8) for step in range(7)]
    assert shown.scalars("eval/accuracy") == [(0, 0.0), (4, pytest.approx(0.4))]
    assert not shown.scalars("step")
    assert "    wrong at 4\n" in shown.texts()[4]
    train(run_dir, recipe, range(7, 13), 12)
    assert TensorBoardRun(run_dir).scalars("reward") == [(step, step / 8) for step in range(13)]


SOLO = """
import contextlib, sys
from harness.config import recipe as recipes; from harness.loggers.loggers import Loggers
from harness.records.run_dir import RunDir
run_dir = RunDir(sys.argv[1])
with contextlib.closing(Loggers(recipes.read(run_dir.recipe), run_dir)) as log:
    log.report(3, {"step": 1, "reward": 0.5, "step_time": 2.0})
"""


@contextlib.contextmanager
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server's address, and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            """Nothing to the console."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def run_alone(run_dir: RunDir, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SOLO, run_dir.path],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.claim("W&B is offline unless it is told to be online")
def test_a_key_in_the_environment_neither_calls_anyone_nor_is_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    runs = [make_run(tmp_path / name, recipe_of("console", "wandb")) for name in ("run", "other")]
    with listener() as (address, asked):
        done = run_alone(runs[0], WANDB_BASE_URL=address, HOME=str(home))
        assert asked == []
        # The server would have noticed: W&B's error reports, which are off, come here.
        run_alone(runs[1], WANDB_BASE_URL=address, HOME=str(home), WANDB_ERROR_REPORTING="true")
        assert asked
    assert (done.stdout, done.stderr) == ("step 1/3  reward 0.500  2.00 s/step  ETA 4 s\n", "")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_wandb_that_cannot_start_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("wandb")
    run_dir = make_run(tmp_path / "run", recipe)
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="offline, online, disabled"):
        Loggers(recipe, run_dir)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(run_dir, recipe, range(2), 8)
    assert not (run_dir.path / "wandb").exists()


def test_online_without_a_key_says_what_to_do_and_asks_nothing(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", recipe_of("wandb"))
    done = run_alone(run_dir, WANDB_MODE="online", WANDB_API_KEY="", HOME=str(tmp_path))
    assert "UserError: error: WANDB_MODE=online needs an API key" in done.stderr
    assert "wandb login" in done.stderr
    assert not (run_dir.path / "wandb").exists()


def test_importing_and_building_load_only_what_is_asked_for(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", recipe_of("console"))
    code = (
        SOLO + "print({'torch', 'vllm', 'ray', 'pandas', 'wandb', 'tensorboardX', 'pyarrow'} & "
        "set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run_dir.path],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_every_logger_is_closed_when_one_fails(tmp_path: Path) -> None:
    recipe = recipe_of("tensorboard", "wandb")
    run_dir = make_run(tmp_path / "run", recipe)
    log = Loggers(recipe, run_dir)
    log.report(8, row_of(1))
    manifest = run_dir.manifest.read_text()
    run_dir.manifest.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        log.close()
    run_dir.manifest.write_text(manifest)
    assert TensorBoardRun(run_dir).scalars("reward") == [(1, 0.125)]


@pytest.mark.slow
def test_wandb_inside_a_ray_worker(tmp_path: Path) -> None:
    from rltrain.distributed.cluster import cluster

    recipe = recipe_of("wandb")
    runs = [make_run(tmp_path / name, recipe) for name in ("one", "other")]

    with cluster(cpus=1, gpus=0, threads=1, address=None):
        import ray

        worker = ray.remote(train)
        ray.get([worker.remote(run, recipe, range(9), 8, "a sweep") for run in runs])
    for run in runs:
        kept = WandBRun(run)
        assert kept.steps == list(range(9))
        assert list(kept.tables()) == [0, 4, 8]
        assert kept.exit_codes == [0]
