"""Progress of a run on the console."""

from __future__ import annotations

import sys
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from harness.config.metrics import duration
from harness.loggers.base import RunLogger

WIDTH = 100
_SHOWN = (
    ("eval/accuracy", "held-out {:.3f}"),
    ("eval/num_problems", "of {:.0f} problems"),
    ("reward", "reward {:.3f}"),
    ("kl", "kl {:.4f}"),
    ("completions/mean_length", "length {:.0f}"),
    ("grad_norm", "grad {:.3f}"),
    ("step_time", "{:.2f} s/step"),
)
_FINISH_REASONS = {"stop": "stopped", "length": "cut at the limit"}


class Console(RunLogger):
    """Prints a line for each row with the time left, and sampled completions of an evaluation."""

    replay_from = None

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def log(
        self, row: Mapping[str, float], samples: Sequence[Mapping[str, Any]], total_steps: int
    ) -> None:
        """Print one completion, one with another reward if there is any, then the row."""
        step = int(row["step"])
        others = [sample for sample in samples if sample["reward"] != samples[0]["reward"]]
        for sample in (*samples[:1], *others[:1]):
            text = "\n".join(_sample_lines(step, sample))
            encoding = sys.stdout.encoding or "utf-8"
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        if "step_time" in row:
            self._seconds.append(row["step_time"] + row.get("timing_s/eval", 0.0))
        parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
        parts += [text.format(row[name]) for name, text in _SHOWN if name in row]
        if self._seconds and step < total_steps:
            left = (total_steps - step) * sum(self._seconds) / len(self._seconds)
            parts.append(f"ETA {duration(left)}")
        print("  ".join(parts), flush=True)


def _sample_lines(step: int, sample: Mapping[str, Any]) -> list[str]:
    finish = _FINISH_REASONS.get(sample["finish_reason"], sample["finish_reason"])
    truth = _shorten(sample["ground_truth"], 1)[0]
    head = f"  sample at step {step}: reward {sample['reward']:g}, wanted {truth}"
    lines = [f"{head}, {sample['num_tokens']} tokens, {finish}"]
    for name, most in (("question", 3), ("completion", 5)):
        for place, text in enumerate(_shorten(sample[name], most)):
            lines.append(f"    {'' if place else name:<10}  {text}")
    return lines


def _shorten(value: object, most: int) -> list[str]:
    """Return at most `most` lines of a text, its last line among them: it holds the answer.

    Control characters are shown as escapes, as Python writes them.
    """

    def visible(character: str) -> str:
        if unicodedata.category(character) == "Zs" or character == "\t":
            return " "
        shown_as_is = character == "\n" or character.isprintable()
        return character if shown_as_is else ascii(character)[1:-1]

    lines = [
        part
        for line in "".join(map(visible, str(value).strip())).split("\n")
        for part in textwrap.wrap(line, WIDTH, break_on_hyphens=False)
    ]
    if len(lines) <= most:
        return lines or ["(empty)"]
    if most == 1:
        return [lines[0][: WIDTH - 1] + "…"]
    return [*lines[: most - 2], "…", lines[-1]]
