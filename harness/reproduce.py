"""`python -m harness.reproduce RUN_DIR`: train a run again and say whether it comes out the same,
step by step.
"""

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
    """Parse, compare what the run was made with, train it again, compare; 0: equal, 1: not, 4: it
    failed on the way.
    """
    options = _parse(argv)
    planned = reproduce.plan(options.run, options.output)
    agrees = _tell_agreement(planned)
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
            return _tell_failure(planned, error)
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
        "--output", metavar="DIR", help="where it goes (default: runs/NAME-reproduced-TIME)"
    )
    only = (
        "say what differs from when the run was made, and no more; exit with 1 when anything does"
    )
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


def _tell_agreement(planned: Reproduction) -> bool:
    """Print what is as it was when the run was made and what is not; whether nothing differs."""
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
    """Say how closely a run that was made on a GPU can be reproduced; None for a CPU: to
    the bit.
    """
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
    """Train again, with a line per step and one at the first that departs; the last step
    trained.
    """
    print(
        f"run {shown(planned.run_dir.path)}\nloading the model and starting the engine ...",
        flush=True,
    )
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    return _follow(planned, options)


def _follow(planned: Reproduction, options: argparse.Namespace) -> int:
    from rltrain.tools.compare import compare_rows, rows_until

    wanted, console, departed, step = (
        rows_until(planned.original, planned.last),
        Console(),
        False,
        0,
    )
    with contextlib.closing(reproduce.rerun(planned)) as reports:
        for report in reports:
            step = report.step
            console.log(report.metrics, [], min(report.total_steps, planned.last))
            found = compare_rows(step, wanted.get(step), without_timings(report.metrics))
            beyond = next(
                (departure for departure in found if departure.size > options.tolerance), None
            )
            if beyond is not None and not departed:
                departed = True
                print(f"departs at {beyond}", flush=True)
            if departed and options.stop_at_departure:
                break
    return step


def _tell_failure(planned: Reproduction, error: Exception) -> int:
    """Say how far a repetition came that failed, and why; bad input that was found before the first
    step is raised.
    """
    rows, run_dir = MetricsFile(planned.run_dir.metrics).rows(), planned.run_dir
    if isinstance(error, BrokenPipeError) or (isinstance(error, UserError) and not rows):
        raise error
    where = f"after step {rows[-1]['step']} of {planned.last}" if rows else "before its first step"
    verdict = f"failed {where}: {one_line(error)}"
    reproduce.give_up(planned, verdict, error)
    print(f"nothing is compared; where it failed stands in {shown(run_dir.log)}", file=sys.stderr)
    print(f"{verdict}  {shown(run_dir.path)}")
    return FAILED


def _conclude(planned: Reproduction, step: int, tolerance: float) -> int:
    """Compare all there is of both, print the verdict, and write it to the repetition's
    manifest.
    """
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
