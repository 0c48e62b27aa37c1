"""Time and memory of log-probabilities and entropies under a real model's vocabulary.

Forward and backward passes are compared in chunks, with all rows at once, and by PyTorch's
autograd. Each contender is a fresh process, and they alternate; memory is the peak above the
inputs.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from tests.benchmarks.side_by_side import middle, result, write_record

ROUNDS = 3
SHAPE = {"tokens": 4096, "vocabulary": 151_936, "hidden": 896}
CONTENDERS = ("in chunks", "all rows at once", "PyTorch's autograd")


def main() -> None:
    """Measure, print, and write `docs/benchmarks/head.json`."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    threads = os.cpu_count() or 1
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name in CONTENDERS:
            runs[name].append(result("head_run", {**SHAPE, "how": name}, threads=threads))
    rows = [
        {
            "contender": name,
            **{key: middle(one[key] for one in passes) for key in passes[0] if key != "seconds"},
        }
        for name, passes in runs.items()
    ]
    for row in rows:
        print(
            f"{row['contender']:>20}  {row['pass_s']:7.2f} s  {row['memory_gb']:6.2f} GiB  "
            f"{row['logprobs']:.6f} "
            f"{row['entropies']:.6f} {row['gradient']:.6f}"
        )
    write_record("head", __doc__, rounds=ROUNDS, threads=threads, shape=SHAPE, rows=rows)


if __name__ == "__main__":
    main()
