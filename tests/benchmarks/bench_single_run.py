"""One GRPO run, TRL's GRPOTrainer + PEFT against ours with either engine.

Measured are tokens a second, start-up, memory and accuracy. Base, problems, reward, batch, learning
rate, LoRA and number of steps are the same. Contenders alternate, each time in a fresh process.
First each tries its settings that change only the speed; the fastest is measured.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.side_by_side import create_environment, middle, result, write_record
from tests.benchmarks.task import task_of
from tests.benchmarks.trl_run import PACKAGES

THREADS = 2
ROUNDS = 3
LORA = {"rank": 8, "alpha": 32.0, "targets": "all-linear"}


def our_variants(engine: str) -> dict[str, dict[str, Any]]:
    """Return our settings that change only the speed, for an engine."""
    budget = "trainer.max_tokens_per_microbatch="
    return {
        "as it comes": {"engine": engine, "overrides": []},
        "2048 tokens a micro-batch": {"engine": engine, "overrides": [f"{budget}2048"]},
        "6144 tokens a micro-batch": {"engine": engine, "overrides": [f"{budget}6144"]},
        "1 thread": {"engine": engine, "overrides": [], "threads": 1},
    }


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "TRL": {
        "32 a device": {"per_device": 32},
        "128 a device": {"per_device": 128},
        "512 a device": {"per_device": 512},
        "128 a device, eager attention": {"per_device": 128, "attention": "eager"},
        "128 a device, static cache": {"per_device": 128, "cache": "static"},
        "128 a device, 1 thread": {"per_device": 128, "threads": 1},
    },
    "ours, transformers": our_variants("transformers"),
    "ours, vllm": our_variants("vllm"),
}


@dataclass(frozen=True, slots=True)
class Setup:
    """The recipe, settings and numbers of steps of a comparison.

    Attributes:
        variants: each contender's settings that change only the speed, by name.
        steps: timed steps by completions of a batch, after `warm_up` steps.
        tried: the same, when trying the settings.
        accuracy_completions: completions of a batch in the runs to the same accuracy.
        accuracy_steps: steps of these runs, of which each `keep_every`th adapter is scored.
        samples: of each held-out problem, for that score.
    """

    recipe: str
    lr: float
    variants: dict[str, dict[str, dict[str, Any]]]
    steps: dict[int, int]
    tried: dict[int, int]
    warm_up: int
    accuracy_completions: int
    accuracy_steps: int
    keep_every: int
    samples: int
    accuracies: tuple[float, ...]
    seeds: tuple[int, ...]


SETUP = Setup(
    recipe="quickstart",
    lr=1e-3,
    variants=VARIANTS,
    steps={64: 14, 512: 8},
    tried={64: 6, 512: 3},
    warm_up=2,
    accuracy_completions=128,
    accuracy_steps=32,
    keep_every=2,
    samples=2,
    accuracies=(0.6, 0.7, 0.8, 0.9),
    seeds=(0, 1, 2),
)


def main() -> None:
    """Measure, print, and write `docs/benchmarks/single_run.json`."""
    compare("single_run", __doc__, SETUP)


def compare(name: str, what: str | None, setup: Setup) -> None:
    """Measure a setup as the command line says, print, and write `docs/benchmarks/<name>.json`."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--completions", type=int, nargs="*", default=list(setup.steps))
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="*",
        default=list(setup.seeds),
        help="of the runs to the same accuracy",
    )
    names = list(setup.variants)
    parser.add_argument("--contenders", nargs="*", default=names, choices=names)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        contest = Comparison(setup, Path(scratch), options.contenders, options.threads)
        speed = {str(n): contest.speed(n, options.rounds) for n in options.completions}
        accuracy = contest.accuracy(options.seeds) if options.seeds else None
    write_record(
        name,
        what,
        threads=options.threads,
        rounds=options.rounds,
        lora=LORA,
        lr=setup.lr,
        speed=speed,
        accuracy=accuracy,
    )


class Comparison:
    """The contenders, and the folder of their runs."""

    def __init__(
        self, setup: Setup, scratch: Path, contenders: Sequence[str], threads: int
    ) -> None:
        self._setup = setup
        self._task = task_of(setup.recipe)
        self._scratch = scratch
        self._contenders = contenders
        self._threads = threads
        self._trl = create_environment(scratch / "trl", PACKAGES)
        self._runs = 0

    def speed(self, completions: int, rounds: int) -> dict[str, Any]:
        """Return tried and chosen settings, and each contender's rounds with medians.

        The batch size is the same for all.
        """
        tried = self._try(completions)
        chosen = {
            name: max(rates, key=lambda variant: rates[variant]) for name, rates in tried.items()
        }
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
        for name in self._turns(rounds):
            row = self._row(name, chosen[name], completions, self._setup.steps[completions])
            measured[name].append(row)
            rate, memory = row["tokens_per_second"], row["memory_gb"]
            print(
                f"{completions:>4} completions  {name:<20} {rate:>8.0f} tokens/s  "
                f"{row['step_s']:.3f} s a step  "
                f"start-up {row['startup_s']:.1f} s  {memory:.2f} GiB",
                flush=True,
            )
        return {
            name: {
                "settings": chosen[name],
                "tried_tokens_per_second": tried[name],
                "rounds": rows,
                **medians(rows),
            }
            for name, rows in measured.items()
        }

    def accuracy(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Return the seconds until each contender's adapter reaches an accuracy.

        One evaluation scores all adapters while the clock is stopped.
        """
        setup = self._setup
        completions, steps = setup.accuracy_completions, setup.accuracy_steps
        curves: dict[str, list[list[dict[str, float]]]] = {name: [] for name in self._contenders}
        tried = self._try(completions)
        for seed in seeds:
            for name in self._contenders:
                variant = max(tried[name], key=lambda one: tried[name][one])
                # One step more: our final evaluation is part of the last step.
                run = self._run(name, variant, completions, steps + 1, seed=seed, keep=True)
                run["kept"] = [one for one in run["kept"] if one["step"] <= steps]
                spec = {"recipe": setup.recipe, "adapters": run["kept"], "samples": setup.samples}
                scored = result("score_adapters", spec, threads=self._threads)
                curves[name].append(curve(run, scored["accuracy"]))
                print(
                    f"seed {seed}  {name:<20} {curves[name][-1][-1]['accuracy']:.3f} after "
                    f"{curves[name][-1][-1]['seconds']:.1f} s",
                    flush=True,
                )
        return {
            "completions": completions,
            "steps": steps,
            "seeds": list(seeds),
            "contenders": {
                name: {"curves": points, "reached": reached(points, setup.accuracies)}
                for name, points in curves.items()
            },
        }

    def _turns(self, rounds: int) -> Iterator[str]:
        yield from (name for _ in range(rounds) for name in self._contenders)

    def _try(self, completions: int) -> dict[str, dict[str, float]]:
        """Return completion tokens a second of each contender and setting, in short runs."""
        tried = self._setup.tried
        steps = tried.get(completions, tried[min(tried)])
        rates: dict[str, dict[str, float]] = {name: {} for name in self._contenders}
        for name in self._contenders:
            for variant in self._setup.variants[name]:
                row = self._row(name, variant, completions, steps)
                rates[name][variant] = round(row["tokens_per_second"], 1)
                print(
                    f"{completions:>4} completions  {name}, {variant}: "
                    f"{row['tokens_per_second']:.0f}",
                    flush=True,
                )
        return rates

    def _row(self, name: str, variant: str, completions: int, steps: int) -> dict[str, Any]:
        # Our last step includes the final evaluation and checkpoint: one more step, which is not
        # counted.
        timed = slice(self._setup.warm_up, -1)
        run = self._run(name, variant, completions, self._setup.warm_up + steps + 1)
        step_s, lengths = run["step_s"][timed], run["mean_length"][timed]
        rates = [
            completions * length / seconds for length, seconds in zip(lengths, step_s, strict=True)
        ]
        row = {
            "tokens_per_second": middle(rates, 1),
            "step_s": middle(step_s),
            "startup_s": run["startup_s"],
            "first_step_s": run["step_s"][0],
            "mean_length": middle(lengths, 2),
            "memory_gb": run["memory_gb"],
        }
        if "timing_s" in run:
            row["timing_s"] = {
                part: middle(values[timed]) for part, values in run["timing_s"].items()
            }
            row["mfu"] = middle(run["mfu"][timed])
        return row

    def _run(
        self,
        name: str,
        variant: str,
        completions: int,
        steps: int,
        *,
        seed: int = 0,
        keep: bool = False,
    ) -> Any:
        self._runs += 1
        settings = self._setup.variants[name][variant]
        output = self._scratch / f"run{self._runs:03d}"
        threads = settings.get("threads", self._threads)
        every = self._setup.keep_every if keep else 0
        if name == "TRL":
            spec = {
                "task": self._task,
                "completions": completions,
                "steps": steps,
                "seed": seed,
                "lr": self._setup.lr,
                **LORA,
                "output": str(output),
                "keep_every": every,
                "keep": str(output),
                **settings,
            }
            return result("trl_run", spec, threads=threads, python=self._trl)
        prompts = completions // self._task["samples"]
        overrides = [
            f"generator.backend={settings['engine']}",
            "generator.max_num_seqs=512",
            f"seed={seed}",
            f"trainer.train_batch_size={prompts}",
            f"trainer.policy_mini_batch_size={prompts}",
            f"trainer.max_steps={steps}",
            f"trainer.policy.optimizer_config.lr={self._setup.lr}",
            f"trainer.policy.model.lora.rank={LORA['rank']}",
            f"trainer.policy.model.lora.alpha={LORA['alpha']}",
            f"trainer.target_modules={LORA['targets']}",
            "trainer.eval_before_train=false",
            "trainer.eval_interval=0",
            f"trainer.ckpt_interval={every}",
            f"trainer.max_ckpts_to_keep={steps}",
            "expect={}",
            *settings["overrides"],
        ]
        spec = {"recipe": self._setup.recipe, "overrides": overrides, "output": str(output)}
        return result("our_run", spec, threads=threads)


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median over rounds of each number."""
    return {
        key: middle(row[key] for row in rows)
        for key, value in rows[0].items()
        if isinstance(value, (int, float))
    }


def curve(run: dict[str, Any], accuracies: Sequence[float]) -> list[dict[str, float]]:
    """Return accuracy against seconds since launch, and since the first step, at each kept adapter.

    Keeping adapters is not counted: TRL's are written between two of its steps, ours in
    `timing_s/checkpoint`.
    """
    checkpoint = run.get("timing_s", {}).get("timing_s/checkpoint", [0.0] * len(run["step_s"]))
    points = []
    for kept, accuracy in zip(run["kept"], accuracies, strict=True):
        step = kept["step"]
        # The time of the checkpoint after a step is in the next step's row.
        training = sum(run["step_s"][:step]) - sum(checkpoint[: step + 1])
        points.append(
            {
                "step": step,
                "training_s": round(training, 3),
                "accuracy": accuracy,
                "seconds": round(run["startup_s"] + training, 3),
            }
        )
    return points


def reached(
    curves: Sequence[Sequence[dict[str, float]]], accuracies: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Return, for each accuracy, the median seconds until a seed first reached it.

    The number of seeds that did is included.
    """
    table = {}
    for accuracy in accuracies:
        times = {
            key: [first(points, accuracy, key) for points in curves]
            for key in ("seconds", "training_s", "step")
        }
        table[str(accuracy)] = {key: middle(values, 3) for key, values in times.items()} | {
            "seeds": sum(value is not None for value in times["seconds"])
        }
    return table


def first(points: Sequence[dict[str, float]], accuracy: float, key: str) -> float | None:
    """Return where a curve first reaches an accuracy, linearly interpolated, or None."""
    before = None
    for point in points:
        if point["accuracy"] >= accuracy:
            if before is None:
                return point[key]
            share = (accuracy - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return before[key] + share * (point[key] - before[key])
        before = point
    return None


if __name__ == "__main__":
    main()
