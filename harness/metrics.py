"""Metric names (meaning, unit, direction) and where a run's metrics go: a JSONL file and the console."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.errors import UserError, nearest
from harness.rundir import write_text

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One logged metric; no `direction` where neither end is better, `timing` where equal runs differ."""

    name: str
    meaning: str
    unit: str = ""
    direction: Direction | None = None
    timing: bool = False


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("step", "optimizer steps taken; 0 is the base before training"),
        Metric("reward", "mean reward of the step's training samples", direction="maximize"),
        Metric("reward_std", "mean over groups of the rewards' standard deviation"),
        Metric("frac_reward_zero_std", "share of groups whose rewards are all equal: no signal", "share"),
        Metric("completions/mean_length", "mean completion length", "tokens"),
        Metric("completions/clipped_ratio", "share of completions cut at max_generate_length", "share", "minimize"),
        Metric("entropy", "mean entropy of the policy at sampled tokens", "nats"),
        Metric("loss", "policy loss, KL term included"),
        Metric("kl", "mean estimated KL(policy || reference) per token", "nats"),
        Metric("clip_ratio/region_mean", "share of tokens whose ratio the clip holds", "share"),
        Metric(
            "sampling/sampling_logp_difference/mean",
            "mean |log-probability| gap, engine to trainer",
            "nats",
            "minimize",
        ),
        Metric(
            "sampling/sampling_logp_difference/max",
            "largest |log-probability| gap, engine to trainer",
            "nats",
            "minimize",
        ),
        Metric("grad_norm", "gradient norm before clipping"),
        Metric("skipped_updates", "optimizer steps skipped for a non-finite gradient", "count", "minimize"),
        Metric("learning_rate", "learning rate of the step"),
        Metric("num_tokens", "prompt and completion tokens trained on so far", "tokens"),
        Metric("num_dropped_prompts", "training prompts dropped as longer than max_input_length", "count"),
        Metric("step_time", "wall time of the step", "s", "minimize", timing=True),
        Metric("eval/accuracy", "mean reward on held-out problems", "share", "maximize"),
        Metric("eval/mean_length", "mean completion length at evaluation", "tokens"),
        Metric("eval/clipped_ratio", "share of evaluation completions cut at max_generate_length", "share", "minimize"),
        *(
            Metric(f"timing_s/{part}", f"wall time of {part}", "s", "minimize", timing=True)
            for part in ("rollout", "logprobs", "update", "sync", "checkpoint", "eval")
        ),
        Metric(
            "perf/tokens_per_second",
            "completion tokens a second over the whole step",
            "tokens/s",
            "maximize",
            timing=True,
        ),
        Metric(
            "perf/mfu",
            "model FLOPs of the step over its time, as a share of the measured matmul peak",
            "share",
            "maximize",
            timing=True,
        ),
        Metric("perf/max_memory_gb", "peak memory of the process (GPU memory on a GPU)", "GB", "minimize", timing=True),
        Metric("lora/norm_A", "Frobenius norm of all A together"),
        Metric("lora/norm_B", "Frobenius norm of all B together"),
        Metric("lora/effective_rank", "mean over modules of exp(entropy of BA's normalised singular values)"),
    )
}

_FAMILIES = {
    "eval/mean@": Metric("eval/mean@N", "mean reward over N samples a problem", "share", "maximize"),
    "eval/pass@": Metric("eval/pass@N", "share of problems with a right answer among N samples", "share", "maximize"),
}


def lookup(name: str) -> Metric:
    """The definition of a metric; raises UserError with the nearest name for an unknown one."""
    if name in METRICS:
        return METRICS[name]
    for prefix, metric in _FAMILIES.items():
        if name.startswith(prefix) and name[len(prefix) :].isdigit():
            return metric
    guess = nearest(name, METRICS)
    raise UserError(
        "unknown metric", got=name, allowed=", ".join(METRICS), fix=f"did you mean {guess}?" if guess else None
    )


def direction(name: str) -> Direction:
    """Which way is better for a metric a sweep optimises; raises UserError when neither is."""
    found = lookup(name).direction
    if found is None:
        better = ", ".join(m.name for m in METRICS.values() if m.direction and not m.timing)
        raise UserError("this metric has no better end: a sweep cannot optimise it", got=name, allowed=better)
    return found


def without_timings(row: Mapping[str, float]) -> dict[str, float]:
    """A metrics row without what differs between two equal runs."""
    return {name: value for name, value in row.items() if not lookup(name).timing}


class MetricsFile:
    """`metrics.jsonl`: one object per step, flushed to disk as it is written. Non-finite values are written as null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row; raises UserError for a metric that is not defined above."""
        for name in row:
            lookup(name)
        clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, float]]:
        """Every whole row; null reads as NaN. A last line cut short by a kill is left out."""
        return list(self._read()) if self.path.exists() else []

    def truncate(self, step: int) -> None:
        """Keep the rows up to a step: what a resumed run had logged past its checkpoint is logged again."""
        kept = [line for line, row in self._lines() if row["step"] <= step] if self.path.exists() else []
        write_text(self.path, "".join(kept))

    def _read(self) -> Iterator[dict[str, float]]:
        for _, row in self._lines():
            yield {name: math.nan if value is None else value for name, value in row.items()}

    def _lines(self) -> Iterator[tuple[str, dict[str, float]]]:
        for line in self.path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield line, json.loads(line)


class Console:
    """Progress of one run on the console: a line per step or evaluation, with the time left."""

    def __init__(self) -> None:
        self._spent: list[float] = []

    def step(self, total_steps: int, row: Mapping[str, float]) -> None:
        """Print a step's or an evaluation's row."""
        step = int(row["step"])
        if "step_time" in row:
            self._spent.append(row["step_time"] + row.get("timing_s/eval", 0.0))
        parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
        shown = (
            ("eval/accuracy", "held-out {:.3f}"),
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


def duration(seconds: float) -> str:
    """A duration for people: `47 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
