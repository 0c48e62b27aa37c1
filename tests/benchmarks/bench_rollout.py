"""Rollouts of the quickstart's model with a rank-8 adapter: completion tokens a second, both engines in one run."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import machine
from harness import recipe as recipes
from harness.paths import PROJECT
from harness.rundir import RunDir, write_json

REPEATS = 3
PROMPTS = {64: 8, 128: 16, 512: 64}
ENGINES = ("vllm", "transformers")


def main() -> None:
    """Measure, print, and write `docs/benchmarks/rollout.json`."""
    from rltrain.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        packs = {name: _open(name, Path(scratch)) for name in ENGINES}
        rows: list[dict[str, Any]] = [
            {"samples": samples, "engine": name, "seconds": []} for samples in PROMPTS for name in ENGINES
        ]  # fmt: skip
        # One warm-up round, then the engines in turn, so that a slow minute of the machine meets both.
        for repeat in range(REPEATS + 1):
            for row in rows:
                seconds, tokens = _rollout(*packs[row["engine"]], PROMPTS[row["samples"]])
                row["tokens"] = tokens
                if repeat:
                    row["seconds"].append(round(seconds, 4))
    for row in rows:
        row["tokens_per_second"] = round(row["tokens"] / statistics.median(row["seconds"]))
        print(f"{row['engine']:>12}  {row['samples']:>4} samples  {row['tokens_per_second']:>7} tokens/s")
    record = {"what": __doc__, "repeats": REPEATS, "threads": 1, "hardware": machine.hardware(),
              "load_average": os.getloadavg(), "rows": rows}  # fmt: skip
    path = PROJECT / "docs" / "benchmarks" / "rollout.json"
    write_json(path, record)
    print(f"written: {path.relative_to(PROJECT)}")


def _open(engine: str, scratch: Path) -> tuple[Any, Any]:
    """A pack with one rank-8 member whose B is not zero."""
    import torch

    from rltrain.pack import Pack

    recipe = recipes.load("quickstart", [f"generator.backend={engine}", "generator.max_num_seqs=512"])
    run_dir = RunDir(scratch / engine)
    run_dir.create("", {})
    pack = Pack.open(recipe)
    member = pack.join(recipe, run_dir)
    with torch.no_grad():
        for name, parameter in member.policy.parameters.items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
    pack.publish(pack.members)
    return pack, member


def _rollout(pack: Any, member: Any, prompts: int) -> tuple[float, int]:
    """Seconds and completion tokens of one call for `prompts` problems, eight samples each."""
    from rltrain.rollout import request

    sampling = member.recipe.generator.sampling_params
    requests = [
        request(pack, member, problem, sampling, 8, "bench", place)
        for place, problem in enumerate(member.problems[:prompts])
    ]
    start = time.perf_counter()
    groups = pack.engine.generate(requests)
    return time.perf_counter() - start, sum(len(sample.token_ids) for group in groups for sample in group)


if __name__ == "__main__":
    main()
