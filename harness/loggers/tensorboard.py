"""TensorBoard event files of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from harness.loggers.base import RunLogger
from harness.records.run_dir import RunDir


class TensorBoard(RunLogger):
    """Writes event files in the run's `tensorboard/`: metrics as scalars, samples as Markdown.

    A resumed run writes every row to a new file, whose `purge_step` makes TensorBoard hide what
    earlier files hold.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._folder = run_dir.path / "tensorboard"
        self._writer: Any = None

    def log(
        self, row: Mapping[str, float], samples: Sequence[Mapping[str, Any]], total_steps: int
    ) -> None:
        """Log each metric as a scalar, and the completions as one text."""
        step = int(row["step"])
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # TensorBoard reads files in the order of their names, which begin with the second.
            number = len(list(self._folder.glob("events.*")))
            self._writer = SummaryWriter(
                str(self._folder), purge_step=0, flush_secs=1, filename_suffix=f".{number:06d}"
            )
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        if samples:
            text = "\n---\n\n".join(map(_markdown, samples))
            self._writer.add_text("samples", text, step)

    def close(self) -> None:
        """Write what is queued and close the file."""
        if self._writer is not None:
            self._writer.close()


def _markdown(sample: Mapping[str, Any]) -> str:
    truth, question, completion = (
        textwrap.indent(str(sample[name]), "    ", lambda line: True)
        for name in ("ground_truth", "question", "completion")
    )
    return (
        f"reward {sample['reward']:g}, ground truth:\n\n{truth}\n\n"
        f"question:\n\n{question}\n\ncompletion:\n\n{completion}\n"
    )
