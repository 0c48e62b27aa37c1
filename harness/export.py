"""`python -m harness.export RUN --output DIR`: export a run's policy for other programs."""

from __future__ import annotations

from pathlib import Path

from harness.config.metrics import ACCURACY
from harness.core.cli import Parser, invocation, run_command
from harness.core.errors import UserError
from harness.core.paths import shown
from harness.records.run_dir import RunDir
from rltrain.tools import export


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = Parser(
        prog=invocation("export"),
        description="Export a run's policy for transformers, PEFT and vLLM.",
    )
    parser.add_argument("run", type=Path, help="a run's directory, or a sweep's trial's")
    parser.add_argument(
        "--merged",
        action="store_true",
        help="export the base with the adapter merged in, as a complete model",
    )
    parser.add_argument(
        "--which",
        choices=["final", "best"],
        default="final",
        help="the policy after the last step, or at its best evaluation (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder to write; it must not exist yet"
    )
    arguments = parser.parse_args(argv)
    refuse_sweep(arguments.run)
    planned = export.plan(
        arguments.run, arguments.output, which=arguments.which, merged=arguments.merged
    )
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    export.write(planned)
    row = planned.evaluated
    scored = f", held-out accuracy {row[ACCURACY]:.3f} at step {row['step']}" if row else ""
    print(f"{arguments.which} policy{scored}  {shown(planned.output)}")
    return 0


def refuse_sweep(directory: Path) -> None:
    """Raise UserError for a sweep, which has many policies, naming its best trial."""
    if RunDir(directory).read_manifest().get("kind") != "sweep":
        return
    from analysis.experiment import Experiment

    best = Experiment.open(directory).best_trial()
    winner = (
        None
        if best is None
        else f"the winning configuration's best trial is {directory / str(best['run_dir'])}"
    )
    raise UserError(
        "a sweep holds a policy for each trial: name one",
        got=directory,
        allowed=f"one of {directory / 'trials'}/*",
        fix=winner,
    )


if __name__ == "__main__":
    run_command(main)
