"""Where a run's metrics and samples go while it trains: the console, Weights & Biases, TensorBoard.

`metrics.jsonl` is the record; these follow it. What a kill took from them they are told again when
the run goes on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from harness.config import recipe as recipes
from harness.config.metrics import duration
from harness.config.schema import Logger, Recipe
from harness.core.errors import UserError
from harness.loggers.logfiles import event_steps, wandb_steps
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir, Status, write_text

WANDB_MODES = ("offline", "online", "disabled")
# W&B's own code for a run that was interrupted is 255.
_EXIT_CODES = {Status.COMPLETE: 0, Status.PRUNED: 0, Status.FAILED: 1}


class Sink(Protocol):
    """Is told of one run: an evaluation's samples, then the row of its step; at last the result, if
    there is one.
    """

    def samples(self, step: int, path: Path) -> None:
        """Scored completions of an evaluation, a parquet file; comes before the step's row."""

    def step(self, total_steps: int, row: Mapping[str, float]) -> None:
        """A row of metrics, `step` among them."""

    def finish(self, result: dict[str, Any], adapter: Path | None) -> None:
        """The manifest's result of a run that is complete, and the folder of its adapter."""

    def close(self) -> None:
        """Let go, however the run ended: its status is final, or says that it will go on."""


class Sinks:
    """All sinks of one run. `close()` it whatever happens, e.g. with `contextlib.closing`."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, *, group: str | None = None) -> None:
        self._run_dir = run_dir
        self._sinks = build(recipe, run_dir, group=group)

    def report(self, total_steps: int, row: Mapping[str, float]) -> None:
        """A report of the trainer's: its row, the samples its evaluation wrote, and after the last
        step the result.
        """
        samples = _samples_of(self._run_dir, row)
        for sink in self._sinks:
            if samples is not None:
                sink.samples(int(row["step"]), samples)
            sink.step(total_steps, row)
        if row["step"] >= total_steps and self._run_dir.status is Status.COMPLETE:
            self._finish()

    def close(self) -> None:
        """Close every sink, the others too when one fails."""
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
        self._sinks = []

    def _finish(self) -> None:
        folder = self._run_dir.adapter / "final"
        adapter = folder if (folder / "adapter_config.json").is_file() else None
        for sink in self._sinks:
            sink.finish(self._run_dir.read_manifest()["result"], adapter)


def build(recipe: Recipe, run_dir: RunDir, *, group: str | None = None) -> list[Sink]:
    """The sinks that `trainer.logger` names; `group` is the sweep's name. Raises UserError when W&B
    cannot start.
    """
    wanted, sinks = recipe.trainer.logger, list[Sink]()
    if Logger.console in wanted:
        sinks.append(Console())
    if Logger.tensorboard in wanted:
        sinks.append(TensorBoard(run_dir))
    if Logger.wandb in wanted and (mode := wandb_mode()) != "disabled":
        sinks.append(WandB(recipe, run_dir, group=group, mode=mode))
    return sinks


class Console:
    """Progress of one run on the console: a line per step or evaluation, the time left, sampled
    completions.
    """

    def __init__(self) -> None:
        self._spent: list[float] = []

    def samples(self, step: int, path: Path) -> None:
        """Print one completion, and one that was rewarded otherwise if there is any."""
        rows = read_samples(path)
        chosen = rows[:1] + [row for row in rows if row["reward"] != rows[0]["reward"]][:1]
        for row in chosen:
            print(_printable("\n".join(_sample_lines(step, row))), file=sys.stdout, flush=True)

    def step(self, total_steps: int, row: Mapping[str, float]) -> None:
        """Print a step's or an evaluation's row."""
        step = int(row["step"])
        if "step_time" in row:
            self._spent.append(row["step_time"] + row.get("timing_s/eval", 0.0))
        parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
        shown = (
            ("eval/accuracy", "held-out {:.3f}"),
            ("eval/num_problems", "of {:.0f} problems"),
            ("reward", "reward {:.3f}"),
            ("kl", "kl {:.4f}"),
            ("completions/mean_length", "length {:.0f}"),
            ("grad_norm", "grad {:.3f}"),
            ("step_time", "{:.2f} s/step"),
        )
        parts += [text.format(row[name]) for name, text in shown if name in row]
        if self._spent and step < total_steps:
            left = (total_steps - step) * sum(self._spent) / len(self._spent)
            parts.append(f"ETA {duration(left)}")
        print("  ".join(parts), file=sys.stdout, flush=True)

    def finish(self, result: dict[str, Any], adapter: Path | None) -> None:
        """Nothing: the command prints the result."""

    def close(self) -> None:
        """Nothing is held."""


class TensorBoard:
    """Event files in the run's `tensorboard/`: scalars by metric name, samples as text.

    A run that goes on hides what was logged of the steps it repeats, as TensorBoard does by
    `purge_step`.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._folder = run_dir.path / "tensorboard"
        self._writer: Any = None

    def samples(self, step: int, path: Path) -> None:
        """Log the completions as Markdown."""
        self._open(step)
        self._log_samples(step, path)

    def step(self, total_steps: int, row: Mapping[str, float]) -> None:
        """Log each metric as a scalar."""
        self._open(int(row["step"]))
        self._log(row)

    def finish(self, result: dict[str, Any], adapter: Path | None) -> None:
        """Nothing: the last rows hold the result."""

    def close(self) -> None:
        """Write what is queued and close the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> None:
        """Begin a file at the first step told; rows before it that no earlier file holds come
        first.
        """
        if self._writer is not None:
            return
        from tensorboardX import SummaryWriter

        held = event_steps(self._folder)
        # A kill may have left the last one in part.
        whole = held - {max(held, default=0)}
        earlier = _rows_before(self._run_dir, step)
        first = min((int(row["step"]) for row in earlier if row["step"] not in whole), default=step)
        self._writer = SummaryWriter(
            str(self._folder),
            purge_step=first if held else None,
            flush_secs=1,
            filename_suffix=f".{first:06d}",
        )
        for row in earlier:
            if row["step"] >= first:
                self._log(row)
                if (path := _samples_of(self._run_dir, row)) is not None:
                    self._log_samples(int(row["step"]), path)

    def _log(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def _log_samples(self, step: int, path: Path) -> None:
        def code(text: object) -> str:
            return textwrap.indent(str(text), "    ", lambda line: True)

        texts = [
            f"reward {row['reward']:g}, ground "
            f"truth:\n\n{code(row['ground_truth'])}\n\nquestion:\n\n"
            f"{code(row['question'])}\n\ncompletion:\n\n{code(row['completion'])}\n"
            for row in read_samples(path)
        ]
        if texts:
            self._writer.add_text("samples", "\n---\n\n".join(texts), step)


class WandB:
    """A W&B run in the run's `wandb/`, offline unless WANDB_MODE says otherwise; a run that goes on
    keeps its id.

    Offline, W&B writes to disk once a second: rows that a kill took are logged again, and none is
    logged twice.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, *, group: str | None, mode: str) -> None:
        wandb = _import_wandb()
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "WANDB_MODE=online needs an API key", fix="wandb login, or WANDB_MODE=offline"
            )
        id_file = run_dir.path / "wandb" / "run_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(5)
        try:
            self._run = wandb.init(
                project=recipe.trainer.project_name,
                name=run_dir.path.name,
                group=group,
                id=run_id,
                dir=str(run_dir.path),
                config=recipes.to_dict(recipe),
                mode=mode,
                resume="allow" if mode == "online" else None,
                reinit="create_new",
                # Commit and packages are in the manifest.
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    x_save_requirements=False,
                    x_transaction_log_flush_interval=1.0,
                ),
            )
        except wandb.Error as error:
            raise UserError(
                "W&B did not start", got=error, fix="WANDB_MODE=offline, and wandb sync later"
            ) from None
        write_text(id_file, run_id + "\n")
        self._wandb = wandb
        self._run_dir = run_dir
        self._held = (
            set(range(self._run.step)) if mode == "online" else wandb_steps(id_file.parent, run_id)
        )
        self._pending: dict[str, Any] = {}
        self._caught_up = False

    def samples(self, step: int, path: Path) -> None:
        """Log the completions as a table, together with the step's row."""
        self._catch_up(step)
        self._log_samples(step, path)

    def step(self, total_steps: int, row: Mapping[str, float]) -> None:
        """Log the row under its step."""
        self._catch_up(int(row["step"]))
        self._log(row)

    def finish(self, result: dict[str, Any], adapter: Path | None) -> None:
        """Put the result into the summary, and log the adapter as an artifact that refers to the
        run's own files.
        """
        self._run.summary["result"] = result
        if adapter is None:
            return
        artifact = self._wandb.Artifact(f"adapter-{self._run.id}", type="model", metadata=result)
        for file in sorted(path for path in adapter.rglob("*") if path.is_file()):
            artifact.add_file(
                str(file), name=str(file.relative_to(adapter)), policy="immutable", skip_cache=True
            )
        self._run.log_artifact(artifact)

    def close(self) -> None:
        """End the W&B run: finished, failed, or interrupted as the run's status says."""
        status = self._run_dir.status
        self._run.summary["status"] = status.value
        self._run.finish(exit_code=_EXIT_CODES.get(status, 255))

    def _catch_up(self, step: int) -> None:
        if self._caught_up:
            return
        self._caught_up = True
        for row in _rows_before(self._run_dir, step):
            if (path := _samples_of(self._run_dir, row)) is not None:
                self._log_samples(int(row["step"]), path)
            self._log(row)

    def _log(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        if step not in self._held:
            with _staging(self._run_dir.path / "wandb" / "data"):
                self._run.log({**row, **self._pending}, step=step, commit=True)
            self._held.add(step)
        self._pending = {}

    def _log_samples(self, step: int, path: Path) -> None:
        rows = read_samples(path) if step not in self._held else []
        if rows:
            table = self._wandb.Table(
                columns=list(rows[0]), data=[list(row.values()) for row in rows]
            )
            self._pending = {"samples": table}


def wandb_mode() -> str:
    """W&B's mode: WANDB_MODE, else offline, whatever keys there are; raises UserError for one that
    is not known.
    """
    mode = os.environ.get("WANDB_MODE") or "offline"
    if mode not in WANDB_MODES:
        raise UserError("WANDB_MODE is unknown", got=mode, allowed=", ".join(WANDB_MODES))
    return mode


def _import_wandb() -> Any:
    # Read by W&B when it starts: no chatter on the console, no error reports over the network.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[None]:
    """W&B copies tables into this folder, for `wandb sync` to find; by itself it would into the
    home directory.
    """
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of a samples file."""
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _rows_before(run_dir: RunDir, step: int) -> list[dict[str, float]]:
    return [row for row in MetricsFile(run_dir.metrics).rows() if row["step"] < step]


def _samples_of(run_dir: RunDir, row: Mapping[str, float]) -> Path | None:
    """The samples file of the evaluation in a row."""
    path = run_dir.eval_samples(int(row["step"]))
    return path if "eval/accuracy" in row and path.is_file() else None


def _sample_lines(step: int, row: Mapping[str, Any]) -> list[str]:
    how = {"stop": "stopped", "length": "cut at the limit"}.get(
        row["finish_reason"], row["finish_reason"]
    )
    wanted = _shortened(row["ground_truth"], 1)[0]
    lines = [
        (
            f"  sample at step {step}: reward {row['reward']:g}, wanted {wanted}, "
            f"{row['num_tokens']} tokens, {how}"
        )
    ]
    for name, most in (("question", 3), ("completion", 5)):
        shown = _shortened(row[name], most)
        lines += [
            f"    {label:<10}  {text}"
            for label, text in zip([name] + [""] * most, shown, strict=False)
        ]
    return lines


def _shortened(text: object, most: int, width: int = 100) -> list[str]:
    """At most so many lines of a text, its end among them: answers stand there."""
    visible = "".join(c if c == "\n" or c.isprintable() else _escaped(c) for c in str(text).strip())
    lines = [
        part
        for line in visible.split("\n")
        for part in textwrap.wrap(line, width, break_on_hyphens=False)
    ]
    if len(lines) <= most:
        return lines or ["(empty)"]
    if most == 1:
        return [lines[0][: width - 1] + "…"]
    return [*lines[: most - 2], "…", lines[-1]]


def _escaped(character: str) -> str:
    """A character as Python writes it, blanks aside."""
    return (
        " "
        if unicodedata.category(character) == "Zs" or character == "\t"
        else ascii(character)[1:-1]
    )


def _printable(text: str) -> str:
    """A text that stdout's encoding can write."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
