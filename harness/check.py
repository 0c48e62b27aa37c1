"""`python -m harness.check RECIPE`: train a recipe once per seed, and check its expectations."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from harness import run
from harness.config import recipe as recipes
from harness.config.expect import judge
from harness.core.cli import Parser, invocation, run_command
from harness.core.errors import UserError
from harness.core.paths import shown
from harness.records.files import write_json
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import RunDir


def main(argv: list[str]) -> int:
    """Run the command and return its exit status.

    It is 3 when an expectation is not met, and the status of the first run that fails.
    """
    parser = Parser(
        prog=invocation("check"),
        description="Train a recipe once per seed, and check its expectations.",
    )
    parser.add_argument(
        "recipe", help="a recipe with an `expect:` block, e.g. recipes/quickstart.yaml"
    )
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. trainer.max_steps=16")
    parser.add_argument("--seeds", metavar="0,1", help="default: the recipe's sweep.seeds, or 0,1")
    options = parser.parse_intermixed_args(argv)
    recipe = recipes.load(options.recipe, options.overrides, sweeps=False)
    if not recipe.expect:
        raise UserError(
            "the recipe has no expectations",
            got=options.recipe,
            fix="add an expect: block, e.g. expect: {eval/accuracy: {min: 0.9}}",
        )
    seeds = (
        _seeds(options.seeds) if options.seeds else recipe.sweep.seeds if recipe.sweep else [0, 1]
    )
    name = (
        recipe.trainer.run_name
        or f"{Path(options.recipe).stem}-check-{datetime.now():%Y%m%d-%H%M%S}"
    )
    root = Path(recipe.trainer.ckpt_path) / name
    for seed in seeds:
        of_seed = [
            f"seed={seed}",
            "trainer.seed=null",
            recipes.override_for("trainer.ckpt_path", str(root)),
            f"trainer.run_name=seed{seed}",
        ]
        status = _train([options.recipe, *options.overrides, *of_seed, "--check"])
        if status not in (0, run.UNMET):
            with contextlib.suppress(OSError):
                root.rmdir()  # empty if the run's input was refused
            return status
    rows = [MetricsFile(RunDir(root / f"seed{seed}").metrics).rows() for seed in seeds]
    results = judge(recipe.expect, rows)
    write_json(
        root / "check.json",
        {
            "recipe": options.recipe,
            "overrides": options.overrides,
            "seeds": seeds,
            "verdicts": [result.record() for result in results],
        },
    )
    for result in results:
        print(result)
    print(
        f"{sum(result.met for result in results)} of {len(results)} expectations met over "
        f"{len(seeds)} seeds  {shown(root)}"
    )
    return 0 if all(result.met for result in results) else run.UNMET


def _train(arguments: Sequence[str]) -> int:
    """Train one run in a subprocess and return its exit status, 128 + the number of a signal.

    A process cannot start a second vLLM engine on a GPU, and frees its memory only at exit. Ctrl-C
    and SIGTERM are passed on. After Ctrl-C, KeyboardInterrupt is raised once the run has stopped.
    """
    sys.stdout.flush()
    # In its own process group, so that the run gets Ctrl-C once: passed on, not from the terminal.
    process = subprocess.Popen([sys.executable, "-m", "harness.run", *arguments], process_group=0)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        process.kill()  # has no effect once it has ended
        signal.signal(signal.SIGTERM, before)
    return status if status >= 0 else 128 - status


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(
        {int(part) for part in parts}
    ) < len(parts):
        raise UserError("--seeds takes different numbers >= 0", got=text, allowed="0,1,2")
    return [int(part) for part in parts]


if __name__ == "__main__":
    run_command(main)
