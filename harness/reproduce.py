"""`python -m harness.reproduce RUN_DIR`: train a run again, and compare the two step by step."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys

from harness.config.metrics import without_timings
from harness.config.schema import Device
from harness.core.cli import Parser, invocation, run_command
from harness.core.errors import UserError
from harness.core.paths import shown
from harness.loggers.console import Console
from harness.records.metrics_file import MetricsFile
from harness.records.run_dir import one_line
from rltrain.tools import reproduce
from rltrain.tools.reproduce import Reproduction

DEPARTS = 1
FAILED = 4


def main(argv: list[str]) -> int:
    """Run the command and return its exit status: 0 equal, 1 not equal, 4 the new run failed."""
    options = _parse(argv)
    planned = reproduce.plan(options.run, options.output)
    agrees = _print_agreement(planned)
    reproduce.check(planned)
    if options.check_only:
        return 0 if agrees else DEPARTS
    with planned.run_dir.locked("another process writes to this output"):
        reproduce.begin(planned)
        try:
            step = _train(planned, options)
        except KeyboardInterrupt:
            print(f"stopped, nothing is compared  {shown(planned.run_dir.path)}", file=sys.stderr)
            raise
        except Exception as error:
            return _end_failed(planned, error)
        return _conclude(planned, step, options.tolerance)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog=invocation("reproduce"),
        description="Train a run again, and compare the two step by step.",
    )
    parser.add_argument(
        "run", metavar="RUN_DIR", help="a run, or a trial of a sweep: runs/NAME/trials/0003"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="its directory (default: runs/NAME-reproduced-TIME)",
    )
    only = "only print what differs from when the run was made; exit with 1 when anything does"
    parser.add_argument("--check-only", action="store_true", help=only)
    most = "the largest difference of a number that counts as equal (default: 0)"
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="X", help=most)
    parser.add_argument(
        "--stop-at-departure",
        action="store_true",
        help="stop at the first step whose metrics differ",
    )
    options = parser.parse_args(argv)
    if not (math.isfinite(options.tolerance) and options.tolerance >= 0):
        raise UserError("--tolerance is a difference", got=options.tolerance, allowed="0 or more")
    return options


def _print_agreement(planned: Reproduction) -> bool:
    """Print what is the same and what differs since the run was made; return if all is the same."""
    status = planned.was.get("status")
    print(f"reproducing {shown(planned.original.path)}: {status}, up to step {planned.last}")
    agreement = planned.agreement()
    if agreement.equal:
        print(f"  same: {', '.join(agreement.equal)}")
    for difference in agreement.different:
        print(f"  differs: {difference}")
    if agreement.unrecorded:
        print(f"  not recorded: {', '.join(agreement.unrecorded)}")
    if note := _of_gpu(planned):
        print(f"  on a GPU: {note}")
    for entry in planned.was.get("resumed") or []:
        for difference in entry.get("different") or []:
            print(f"  differed when it was resumed at {entry.get('time')}: {difference}")
    return not agreement.different


def _of_gpu(planned: Reproduction) -> str | None:
    """Return how closely a GPU run can be reproduced; None for a CPU run, which is exact."""
    hardware = planned.was.get("hardware")
    gpus = hardware.get("gpus") if isinstance(hardware, dict) else None
    if not gpus or planned.recipe.trainer.placement.device is Device.cpu:
        return None
    if planned.recipe.deterministic:
        return (
            "its recipe has deterministic: true, so the same to the bit on the same "
            "GPU, driver and packages"
        )
    return (
        "its recipe has deterministic: false, so the same up to rounding at first, and "
        "then it may drift"
    )


def _train(planned: Reproduction, options: argparse.Namespace) -> int:
    """Train again and return the last step; prints each step, and the first difference."""
    print(
        f"run {shown(planned.run_dir.path)}\nloading the model and starting the engine ...",
        flush=True,
    )
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    from rltrain.tools.compare import compare_rows, rows_until
    from rltrain.worker_group import train_run

    original_rows = rows_until(planned.original, planned.last)
    console, departed, step = Console(), False, 0
    training = train_run(planned.recipe, planned.run_dir)
    with contextlib.closing(reproduce.until_last_step(planned, training)) as reports:
        for report in reports:
            step = report.step
            console.log(report.metrics, [], min(report.total_steps, planned.last))
            row = without_timings(report.metrics)
            departures = [
                departure
                for departure in compare_rows(step, original_rows.get(step), row)
                if departure.size > options.tolerance
            ]
            if departures and not departed:
                departed = True
                print(f"departs at {departures[0]}", flush=True)
            if departed and options.stop_at_departure:
                break
    return step


def _end_failed(planned: Reproduction, error: Exception) -> int:
    """Record and print how far the new run came and why it failed; return the exit status.

    Bad input that was found before the first step is raised again.
    """
    rows, run_dir = MetricsFile(planned.run_dir.metrics).rows(), planned.run_dir
    if isinstance(error, BrokenPipeError) or (isinstance(error, UserError) and not rows):
        raise error
    where = f"after step {rows[-1]['step']} of {planned.last}" if rows else "before its first step"
    verdict = f"failed {where}: {one_line(error)}"
    reproduce.give_up(planned, verdict, error)
    print(f"nothing is compared; the traceback is in {shown(run_dir.log)}", file=sys.stderr)
    print(f"{verdict}  {shown(run_dir.path)}")
    return FAILED


def _conclude(planned: Reproduction, step: int, tolerance: float) -> int:
    """Compare the two runs, and print the verdict and write it to the new run's manifest."""
    from rltrain.tools.compare import compare

    result = compare(
        planned.original, planned.run_dir, last=step, weights=planned.ended and step == planned.last
    )
    verdict = result.verdict(tolerance)
    reproduce.conclude(planned, verdict, step)
    if result.first(tolerance) and not planned.recipe.deterministic and _of_gpu(planned):
        print(
            "this run was not deterministic: its recipe has deterministic: false, and a "
            "GPU then adds in no fixed "
            "order; compare with --tolerance, or make runs with deterministic=true"
        )
    if not planned.ended:
        print(
            f"the run is {planned.was.get('status')}: compared up to step {step}, the last "
            "it logged; no weights"
        )
    print(f"{verdict}  {shown(planned.run_dir.path)}")
    return DEPARTS if result.first(tolerance) else 0


if __name__ == "__main__":
    run_command(main)
