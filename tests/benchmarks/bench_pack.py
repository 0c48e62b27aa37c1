"""Makespan of N members in one pack, against an upper bound; memory, and shares of the peak.

One trial needs F seconds to start, G for rollouts, and T for the rest of its steps. N trials one
after the other need N (F + G + T); in one pack at least F + N (G/g + T/c), where g and c are the
speedups from one engine call and one update for all members. So the speedup S is at most (F + G +
T) / (F/N + G/g + T/c). G and T are steady steps of a pack of one, F the rest of its makespan. g and
c are measured in a warm pack of N, in seconds a token: steps of all members alternate with steps of
one member at a time. S itself is measured in fresh processes, start-up included. The members differ
only in their seeds, so that a pack of one represents each of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from harness.core.paths import PROJECT
from tests.benchmarks.side_by_side import middle, result, write_record

THREADS = 2
ROUNDS = 3
SIZES = (1, 2, 4, 8, 16, 32)
STEPS = 8
COMPLETIONS = 64
ALTERNATE = 2
ENGINES = ("transformers", "vllm")
MEMORY = ("memory_open_gb", "memory_joined_gb", "memory_peak_gb", "adapter_state_gb")

MEMBERS = 5
SHORT = "generator.sampling_params.max_generate_length=16"  # a random base never ends a completion
LARGER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "layer_types": ["full_attention"] * 10,
}
MAKE_BASE = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1])).save_pretrained(sys.argv[1])
"""


def main() -> None:
    """Measure, print, and write `docs/benchmarks/pack.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=THREADS)
    options = parser.parse_args()
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for engine in options.engines:
            for members in options.sizes:
                spec = {
                    "members": members,
                    "steps": STEPS,
                    "completions": COMPLETIONS,
                    "engine": engine,
                    "alternate": ALTERNATE if members > 1 else 0,
                }
                run = result("pack_run", spec, threads=options.threads)
                runs.setdefault((engine, members), []).append(run)
                print(
                    f"{engine:>12} {members:>3} members  {run['makespan_s']:.1f} s  "
                    f"{run['memory_peak_gb']:.2f} GiB  {run.get('gains', '')}",
                    flush=True,
                )
    engines = {
        engine: table({n: rows for (name, n), rows in runs.items() if name == engine})
        for engine in options.engines
    }
    memory = members_on_a_larger_base(options.threads)
    write_record(
        "pack",
        __doc__,
        rounds=options.rounds,
        threads=options.threads,
        steps=STEPS,
        completions=COMPLETIONS,
        engines=engines,
        memory=memory,
    )


def members_on_a_larger_base(threads: int) -> dict[str, Any]:
    """Return the peak memory of 1 and of several members on a random base of 35 M parameters.

    A second copy of the base would show.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PROJECT / "rltrain" / "assets" / "tiny_gsm", folder, dirs_exist_ok=True)
        (Path(folder) / "model.safetensors").unlink()
        config = json.loads((Path(folder) / "config.json").read_text())
        (Path(folder) / "config.json").write_text(json.dumps({**config, **LARGER}))
        subprocess.run([sys.executable, "-c", MAKE_BASE, folder], check=True)
        runs = {}
        for members in (1, MEMBERS):
            spec = {
                "members": members,
                "steps": 2,
                "completions": 16,
                "engine": "transformers",
                "overrides": [f"trainer.policy.model.path={folder}", SHORT],
            }
            runs[members] = result("pack_run", spec, threads=threads)
    one, several = runs[1], runs[MEMBERS]
    further = (several["memory_peak_gb"] - one["memory_peak_gb"]) / (MEMBERS - 1)
    state = (several["adapter_state_gb"] - one["adapter_state_gb"]) / (MEMBERS - 1)
    print(
        f"a further member: {1024 * further:.0f} MiB, of it {1024 * state:.0f} MiB adapter "
        "and optimizer; "
        f"the base: {1024 * one['base_gb']:.0f} MiB",
        flush=True,
    )
    return {
        "base_gb": one["base_gb"],
        "further_member_gb": round(further, 4),
        "adapter_state_gb": round(state, 4),
        "members": MEMBERS,
        "peak_gb": {str(n): run["memory_peak_gb"] for n, run in runs.items()},
    }


def table(runs: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a row for each number of members, the parts of one trial, and memory per member."""
    one = runs[min(runs)]
    alone = median(run["makespan_s"] for run in one)
    rollout, rest = steady(one, "rollout"), steady(one, "rest")
    solo = {"F": round(alone - rollout - rest, 4), "G": rollout, "T": rest}
    rows = [row(members, results, solo, alone) for members, results in runs.items()]
    further = max(1, rows[-1]["members"] - rows[0]["members"])
    growth = {key: round((rows[-1][key] - rows[0][key]) / further, 5) for key in MEMORY}
    return {
        "solo_s": solo,
        "rows": rows,
        "per_further_member": growth,
        "base_gb": one[0]["base_gb"],
    }


def row(
    members: int, runs: list[dict[str, Any]], solo: dict[str, float], alone: float
) -> dict[str, Any]:
    """Return medians over rounds, the speedup over as many solo runs in sequence, and its bound."""
    gains = [run.get("gains", {"g": 1.0, "c": 1.0}) for run in runs]
    g, c = (median(one[name] for one in gains) for name in ("g", "c"))
    makespan = median(run["makespan_s"] for run in runs)
    least = solo["F"] / members + solo["G"] / g + solo["T"] / c
    return {
        "members": members,
        "makespan_s": round(makespan, 3),
        "speedup": round(members * alone / makespan, 3),
        "bound": round(alone / least, 3),
        "g": round(g, 3),
        "c": round(c, 3),
        "startup_s": middle(run["startup_s"] for run in runs),
        "rollout_s": steady(runs, "rollout"),
        "rest_s": steady(runs, "rest"),
        **{key: middle(run[key] for run in runs) for key in MEMORY},
        **{
            f"{phase}_share_of_peak": middle(
                step[f"{phase}_share_of_peak"] for run in runs for step in run["steps"][1:]
            )
            for phase in ("rollout", "update")
        },
    }


def steady(runs: list[dict[str, Any]], part: str) -> float:
    """Return the seconds of a part over all steps, from the median step.

    The first step warms up and is left out.
    """
    return round(STEPS * median(step[part] for run in runs for step in run["steps"][1:]), 4)


if __name__ == "__main__":
    main()
