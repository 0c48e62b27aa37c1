"""The same configurations as members of packs and each alone, compared with seed noise.

With one thread the two are equal to the bit. With two, sums may be split differently, and runs
drift apart, as with another seed. The difference between packed and alone is compared with the
difference between seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from harness.records.run_dir import RunDir
from tests.benchmarks.bench_sweep import CORES, our_sweep
from tests.benchmarks.side_by_side import write_record

SIZE = 12
STEPS = 16
ENGINES = ("transformers", "vllm")
SEEDS = (0, 1)
THREADS = (1, CORES)


def main() -> None:
    """Measure, print, and write `docs/benchmarks/same_answers.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=SIZE, help="configurations")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    parser.add_argument(
        "--threads", type=int, nargs="*", default=list(THREADS), help="of each process"
    )
    options = parser.parse_args()
    rows = []
    for engine in options.engines:
        for threads in options.threads:
            rows.append(compare(engine, threads, options.size, options.steps))
            print({key: value for key, value in rows[-1].items() if key != "scores"}, flush=True)
            write_record(
                "same_answers",
                __doc__,
                steps=options.steps,
                configurations=options.size,
                seeds=SEEDS,
                rows=rows,
            )


def compare(engine: str, threads: int, size: int, steps: int) -> dict[str, Any]:
    """Return accuracies packed, alone, and packed with another seed, and paired differences."""
    # As many trials or packs at a time as keep the cores busy.
    shared = [f"trainer.num_threads={threads}", f"sweep.max_concurrent={max(1, CORES // threads)}"]
    first, second = (f"sweep.seeds=[{seed}]" for seed in SEEDS)
    packed = scores(engine, size, steps, [*shared, first, f"sweep.pack_size={size}"])
    alone = scores(engine, size, steps, [*shared, first, "sweep.pack_size=1"])
    reseeded = scores(engine, size, steps, [*shared, second, f"sweep.pack_size={size}"])
    differences = [a - b for a, b in zip(packed, alone, strict=True)]
    by_seed = [a - b for a, b in zip(packed, reseeded, strict=True)]
    same = not any(differences)
    return {
        "engine": engine,
        "threads": threads,
        "configurations": size,
        "mean_difference": round(mean(differences), 5),
        "largest_difference": round(max(map(abs, differences)), 5),
        "sd_of_differences": round(stdev(differences), 5),
        "sd_between_seeds": round(stdev(by_seed), 5),
        # Wilcoxon's test has nothing to rank when nothing differs.
        "p_wilcoxon": 1.0
        if same
        else round(float(stats.wilcoxon(differences, zero_method="zsplit").pvalue), 4),
        "same_winner": packed.index(max(packed)) == alone.index(max(alone)),
        "scores": {"packed": packed, "alone": alone, "packed, other seed": reseeded},
    }


def scores(engine: str, size: int, steps: int, overrides: Sequence[str]) -> list[float]:
    """Return the final held-out accuracy of each configuration."""
    with tempfile.TemporaryDirectory() as folder:
        our_sweep(size, Path(folder), [*overrides, f"generator.backend={engine}"], steps)
        sweep = RunDir(Path(folder) / "sweep")
        return [
            sweep.trial(n).read_manifest()["result"]["metrics"]["eval/accuracy"]
            for n in range(size)
        ]


if __name__ == "__main__":
    main()
