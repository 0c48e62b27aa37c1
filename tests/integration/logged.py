"""Runs as loggers see them, and readers of what W&B and TensorBoard left on disk."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.loggers.loggers import Loggers
from harness.records.files import write_bytes
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status
from tests.recipes import quickstart


def recipe_of(*loggers: str) -> Recipe:
    return quickstart([f"trainer.logger=[{','.join(loggers)}]", "trainer.project_name=proving"])


def make_run(path: Path, recipe: Recipe) -> RunDir:
    run_dir = RunDir(path)
    run_dir.create(recipes.to_yaml(recipe), {"result": None})
    run_dir.move_to(Status.RUNNING)
    return run_dir


def row_of(step: int, evaluated: bool = False) -> dict[str, float]:
    return {"step": step, "reward": step / 8, "kl": 0.5} | (
        {"eval/accuracy": step / 10} if evaluated else {}
    )


def sample(**values: Any) -> dict[str, Any]:
    return {
        "step": 0,
        "phase": "eval",
        "index": 7,
        "question": "How many?",
        "ground_truth": "18",
        "completion": "#### 18",
        "reward": 1.0,
        "num_tokens": 5,
        "finish_reason": "stop",
        **values,
    }


def write_samples(run_dir: RunDir, step: int, *rows: dict[str, Any]) -> Path:
    path = run_dir.eval_samples(step)
    write_bytes(path, pd.DataFrame(list(rows)).to_parquet())
    return path


def train(
    run_dir: RunDir, recipe: Recipe, steps: range, total: int, group: str | None = None
) -> None:
    """Report as the trainer does: row and samples on disk first, an evaluation every fourth step,
    at last a result.
    """
    file = MetricsFile(run_dir.metrics)
    file.truncate(steps.start - 1)
    with contextlib.closing(Loggers(recipe, run_dir, group=group)) as log:
        for step in steps:
            row = row_of(step, evaluated=step % 4 == 0)
            if step % 4 == 0:
                write_samples(
                    run_dir,
                    step,
                    sample(step=step),
                    sample(completion=f"wrong at {step}", reward=0.0),
                )
            file.append(row)
            if step == total:
                run_dir.move_to(
                    Status.COMPLETE, result={"step": total, "metrics": {"eval/accuracy": 0.8}}
                )
            log.report(total, row)


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: 7 bytes of header, then LevelDB's log format with its blocks
    of 32 KiB.
    """
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if left < 7:
            place += left
            continue
        part = content[place + 7 : place + 7 + length]
        if kind not in (1, 2, 3, 4) or len(part) < length:
            return
        place += 7 + length
        record += part
        # 1 is a whole record; 2, 3 and 4 are the first, a middle and the last part of one.
        if kind in (1, 4):
            yield record
            record = b""


def event_records(content: bytes) -> Iterator[bytes]:
    """The records of an event file: each a length, a checksum, the record, a checksum."""
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        record = content[place + 12 : place + 12 + length]
        if len(record) < length:
            return
        yield record
        place += length + 16


def wandb_steps(run_dir: RunDir) -> list[int]:
    """The steps that a run's `.wandb` files hold now, while W&B may still be writing."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = [
        Record.FromString(data)
        for file in sorted((run_dir.path / "wandb").glob("*run-*/*.wandb"))
        for data in wandb_records(file.read_bytes())
    ]
    return [int(record.history.step.num) for record in records if record.HasField("history")]


class WandBRun:
    """What the `.wandb` files of one run directory hold, in the order in which `wandb sync` would
    send them.
    """

    def __init__(self, run_dir: RunDir) -> None:
        import wandb
        from wandb.proto.wandb_internal_pb2 import Record

        # A run's end reaches its file some milliseconds after `finish` returns, at the latest as
        # W&B's service ends.
        wandb.teardown()
        self.files = sorted((run_dir.path / "wandb").glob("*run-*/*.wandb"))
        self.records = [
            Record.FromString(data)
            for file in self.files
            for data in wandb_records(file.read_bytes())
        ]

    def all(self, kind: str) -> list[Any]:
        return [
            getattr(record, kind)
            for record in self.records
            if record.WhichOneof("record_type") == kind
        ]

    @property
    def history(self) -> list[dict[str, Any]]:
        return [
            {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in history.item
            }
            for history in self.all("history")
        ]

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]

    @property
    def config(self) -> dict[str, Any]:
        updates = [update for run in self.all("run")[-1:] for update in run.config.update]
        return {update.key: json.loads(update.value_json) for update in updates}

    @property
    def exit_codes(self) -> list[int]:
        return [int(record.exit_code) for record in self.all("exit")]

    def artifacts(self, kind: str) -> list[Any]:
        return [artifact for artifact in self.all("artifact") if artifact.type == kind]

    def tables(self) -> dict[int, dict[str, Any]]:
        """The tables that the history refers to, by step."""
        return {
            row["_step"]: json.loads(
                next(self.files[0].parents[1].glob(f"*/files/{row['samples/path']}")).read_text()
            )
            for row in self.history
            if "samples/path" in row
        }


class TensorBoardRun:
    """What TensorBoard would show of a run directory: a file's purge hides what files before it
    hold of later steps.
    """

    def __init__(self, run_dir: RunDir) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.seen: list[tuple[int, str, Any]] = []
        for file in sorted((run_dir.path / "tensorboard").iterdir()):
            for data in event_records(file.read_bytes()):
                event = Event.FromString(data)
                if event.session_log.status == SessionLog.START:
                    self.seen = [entry for entry in self.seen if entry[0] < event.step]
                self.seen += [(event.step, value.tag, value) for value in event.summary.value]

    def scalars(self, name: str) -> list[tuple[int, float]]:
        return [(step, value.simple_value) for step, tag, value in self.seen if tag == name]

    def texts(self) -> dict[int, str]:
        return {
            step: value.tensor.string_val[0].decode()
            for step, tag, value in self.seen
            if tag.startswith("samples")
        }
