"""Seconds from a trial's end to the start of the next trial in its slot.

There are three times as many trials as slots. Trials have several lengths, so that some end
together and some apart.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.benchmarks.bench_sweep import CORES, our_sweep
from tests.benchmarks.side_by_side import middle, write_record

SIZE = 12
STEPS = (8, 12, 10)
WAYS = {
    "packed": ["sweep.max_concurrent=1", f"sweep.pack_size={SIZE // 3}"],
    "unpacked": [f"sweep.max_concurrent={CORES}", "sweep.pack_size=1"],
}


def main() -> None:
    """Measure, print, and write `docs/benchmarks/handover.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=SIZE, help="trials")
    parser.add_argument(
        "--steps", type=int, nargs="*", default=list(STEPS), help="of the trials, alternating"
    )
    options = parser.parse_args()
    waits = {}
    for name, slots in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            outcome = our_sweep(
                options.size, Path(folder), [*slots, "trainer.num_threads=1"], *options.steps
            )
        waits[name] = outcome["next_trial_after_s"]
        print(f"{name}: the next trial after {middle(waits[name])} s", flush=True)
    write_record("handover", __doc__, steps=options.steps, trials=options.size, waits_s=waits)


if __name__ == "__main__":
    main()
