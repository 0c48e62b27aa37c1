"""Seconds from the trainer's adapter to an engine that serves it.

Measured are every sync mode, both engines, and several LoRA ranks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.config import recipe as recipes
from harness.config.schema import Backend, SyncMode
from tests.benchmarks.side_by_side import write_record

REPEATS = 9
RANKS = (1, 8, 64, 256)


def main() -> None:
    """Measure, print, and write `docs/benchmarks/sync.json`."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    rows = [row for rank in RANKS for backend in Backend for row in _rows(backend, rank)]
    for row in rows:
        print(
            f"rank {row['rank']:>3}  {row['engine']:>12}  {row['sync']:>6}  "
            f"{1e3 * row['seconds']:8.2f} ms"
        )
    write_record("sync", __doc__, repeats=REPEATS, threads=1, rows=rows)


def _rows(backend: Backend, rank: int) -> list[dict[str, Any]]:
    """Return rows of alternating disk and memory syncs, and of merge on another engine."""
    timed: dict[SyncMode, list[float]] = {}
    for modes in ([SyncMode.disk, SyncMode.memory], [SyncMode.merge]):
        timed |= _timed(backend, rank, modes)
    return [
        {
            "rank": rank,
            "engine": backend.name,
            "sync": mode.name,
            "seconds": round(statistics.median(seconds), 6),
            "fastest": round(min(seconds), 6),
        }
        for mode, seconds in timed.items()
    ]


def _timed(backend: Backend, rank: int, modes: list[SyncMode]) -> dict[SyncMode, list[float]]:
    """Return wall seconds of each publication after the first, each of a new version."""
    import torch

    from rltrain.engines.base import EngineOptions, build_engine, stop_token_ids
    from rltrain.models import loading as models
    from rltrain.sync.registry import build_sync

    torch.set_num_threads(1)
    recipe = recipes.load(
        "quickstart",
        [f"generator.backend={backend.name}", f"trainer.policy.model.lora.rank={rank}"],
    )
    model: Any
    model, tokenizer = models.load_base(recipe)
    for mode in modes:
        model = models.add_adapter(
            model, mode.name, models.lora_config(recipe, recipe.trainer.policy.model.lora), 0
        )
    path = models.model_folder(recipe.trainer.policy.model.path)
    max_rank = 0 if modes == [SyncMode.merge] else rank
    options = EngineOptions(
        path, torch.float32, stop_token_ids(model, tokenizer), max_rank, len(modes)
    )
    engine = build_engine(recipe, model, options)
    seconds: dict[SyncMode, list[float]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as scratch:
        syncs = {mode: build_sync(mode, Path(scratch) / mode.name) for mode in modes}
        for version in range(REPEATS + 1):
            for mode, sync in syncs.items():
                start = time.perf_counter()
                sync.publish(engine, model, mode.name, version + 1)
                seconds[mode].append(time.perf_counter() - start)
    engine.close()
    return {mode: values[1:] for mode, values in seconds.items()}


if __name__ == "__main__":
    main()
