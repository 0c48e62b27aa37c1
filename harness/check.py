"""`python -m harness.check RECIPE [overrides]`: train a recipe once per seed, and check what it expects of the mean."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from harness import recipe as recipes
from harness import run
from harness.cli import Parser, invocation, run_command
from harness.errors import UserError
from harness.expect import judge
from harness.metrics import MetricsFile
from harness.paths import shown
from harness.rundir import RunDir, write_json


def main(argv: list[str]) -> int:
    """Parse, train every seed, judge, print; 3 when an expectation is not met."""
    parser = Parser(prog=invocation("check"), description="Train a recipe once per seed, and check its expectations.")
    parser.add_argument("recipe", help="a recipe with an `expect:` block, e.g. recipes/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. trainer.max_steps=16")
    parser.add_argument("--seeds", metavar="0,1", help="default: the recipe's sweep.seeds, or 0,1")
    options = parser.parse_intermixed_args(argv)
    recipe = recipes.load(options.recipe, options.overrides)
    if not recipe.expect:
        raise UserError("the recipe expects nothing", got=options.recipe,
                        fix="add an expect: block, e.g. expect: {eval/accuracy: {min: 0.9}}")  # fmt: skip
    seeds = _seeds(options.seeds) if options.seeds else recipe.sweep.seeds if recipe.sweep else [0, 1]
    name = recipe.trainer.run_name or f"{Path(options.recipe).stem}-check-{datetime.now():%Y%m%d-%H%M%S}"
    root = Path(recipe.trainer.ckpt_path) / name
    for seed in seeds:
        own = [f"seed={seed}", "trainer.seed=null", recipes.override_for("trainer.ckpt_path", str(root)),
               f"trainer.run_name=seed{seed}"]  # fmt: skip
        run.main([options.recipe, *options.overrides, *own])
    rows = [MetricsFile(RunDir(root / f"seed{seed}").metrics).rows() for seed in seeds]
    verdicts = judge(recipe.expect, rows)
    write_json(root / "check.json", {"recipe": options.recipe, "overrides": options.overrides, "seeds": seeds,
                                     "verdicts": [verdict.record() for verdict in verdicts]})  # fmt: skip
    for verdict in verdicts:
        print(verdict)
    print(f"{sum(v.met for v in verdicts)} of {len(verdicts)} expectations met over {len(seeds)} seeds  {shown(root)}")
    return 0 if all(verdict.met for verdict in verdicts) else run.UNMET


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise UserError("--seeds takes different numbers >= 0", got=text, allowed="0,1,2")
    return [int(part) for part in parts]


if __name__ == "__main__":
    run_command(main)
