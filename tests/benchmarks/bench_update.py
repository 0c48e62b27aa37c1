"""Seconds of the update of the quickstart's model at rank 8, by each method, in one process."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from harness.config import recipe as recipes
from harness.records.run_dir import RunDir
from tests.benchmarks.side_by_side import write_record

REPEATS = 5
PROMPTS = {64: 8, 512: 64}
PACK_SIZES = (1, 4, 8, 16)
# name -> (packed, shared prompts, W + s B A, zero advantages skipped; trainer keys)
ROWS, BUDGET = "micro_train_batch_size_per_gpu", "max_tokens_per_microbatch"
WAYS: dict[str, tuple[tuple[bool, bool, bool, bool], dict[str, int | None]]] = {
    "padded rows, 16 sequences": ((False, False, False, False), {ROWS: 16}),
    "padded rows, 64 sequences": ((False, False, False, False), {ROWS: 64}),
    "packed, 16 sequences": ((True, False, False, False), {ROWS: 16}),
    "and a group's prompt once": ((True, True, False, False), {ROWS: 16}),
    "and one LoRA product": ((True, True, True, False), {ROWS: 16}),
    "and zero advantages skipped": ((True, True, True, True), {ROWS: 16}),
    "all, 64 sequences": ((True, True, True, True), {ROWS: 64}),
    "all, 1024 tokens": ((True, True, True, True), {BUDGET: 1024}),
    "all, 2048 tokens": ((True, True, True, True), {BUDGET: 2048}),
    "all, 4096 tokens": ((True, True, True, True), {BUDGET: 4096}),
}


def main() -> None:
    """Measure, print, and write `docs/benchmarks/update.json`."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        pack, member = _open(Path(scratch))
        rows = [
            row
            for count, prompts in PROMPTS.items()
            for row in _measure(pack, member, count, prompts)
        ]
        switching = _switching(pack, member.recipe, Path(scratch))
    write_record("update", __doc__, repeats=REPEATS, threads=1, rows=rows, adapter_switch=switching)


def _open(scratch: Path) -> tuple[Any, Any]:
    """Return a pack with one member, whose learning rate is too small to affect the measurement."""
    from rltrain.pack import Pack

    recipe = recipes.load(
        "quickstart",
        [
            "generator.backend=transformers",
            "generator.max_num_seqs=512",
            "trainer.sync_tolerance=1e9",
            f"trainer.train_batch_size={max(PROMPTS.values())}",
            f"trainer.policy_mini_batch_size={max(PROMPTS.values())}",
            "trainer.policy.optimizer_config.lr=1e-12",
        ],
    )
    pack = Pack.open(recipe, slots=max(PACK_SIZES))
    member = pack.add(recipe, _run_dir(scratch, "run"))
    pack.publish_member(member)
    return pack, member


def _run_dir(scratch: Path, name: str) -> RunDir:
    run_dir = RunDir(scratch / name)
    run_dir.create("", {})
    return run_dir


def _measure(pack: Any, member: Any, count: int, prompts: int) -> list[dict[str, Any]]:
    """Return a row for each method: seconds, CPU seconds and tokens a second of one update."""
    from rltrain.algorithms.advantages import compute_advantages
    from rltrain.models import attention
    from rltrain.rollout import sample_rollouts
    from rltrain.step import update

    assert pack.model.config._attn_implementation == attention.NAME
    ((rollout, _),) = sample_rollouts(pack, [member]).values()
    rollout = rollout.select(range(prompts))
    batch = rollout.to_batch(pack.pad_id)
    compute_advantages(member.recipe, batch, rollout.rewards, rollout.truncated)
    rows: list[dict[str, Any]] = [
        {"completions": count, "way": way, "seconds": [], "cpu_seconds": []} for way in WAYS
    ]
    # One warm-up round, then alternating, so that a slow minute of the machine affects all.
    for repeat in range(REPEATS + 1):
        for row in rows:
            kind, keys = WAYS[row["way"]]
            trainer = member.recipe.trainer
            for key, value in ({ROWS: 16, BUDGET: None} | keys).items():
                setattr(trainer, key, value)
            with method(*kind):
                start, cpu = time.perf_counter(), time.process_time()
                update(pack, member, member.policy, batch, 0)
                spent = time.perf_counter() - start, time.process_time() - cpu
            if repeat:
                row["seconds"].append(round(spent[0], 4))
                row["cpu_seconds"].append(round(spent[1], 4))
    assert batch.advantages is not None
    tokens = int(batch.mask.sum())
    first = statistics.median(rows[0]["cpu_seconds"])
    for row in rows:
        cpu = statistics.median(row["cpu_seconds"])
        row |= {
            "tokens": tokens,
            "tokens_per_cpu_second": round(tokens / cpu),
            "speedup": round(first / cpu, 2),
        }
        row["zero_advantages"] = float((batch.advantages.abs().sum(dim=1) == 0).float().mean())
        print(f"{count:>4} completions  {row['way']:>28}  {cpu:.3f} CPU-s  x{row['speedup']}")
    return rows


@contextlib.contextmanager
def method(packed: bool, shared: bool, one_product: bool, skipping: bool) -> Iterator[None]:
    """Disable parts of the update, for comparison."""
    from peft.tuners import lora

    from rltrain.algorithms.policy import Policy
    from rltrain.algorithms.trained_model import TrainedModel
    from rltrain.models import logprobs
    from rltrain.models.lora import LoRALinear

    with contextlib.ExitStack() as stack:
        if not packed:
            stack.enter_context(mock.patch.object(logprobs, "can_pack", return_value=False))
        if not shared:
            stack.enter_context(mock.patch.object(logprobs, "_drops", return_value=True))
        if not one_product:
            stack.enter_context(mock.patch.object(LoRALinear, "forward", lora.Linear.forward))
        if not skipping:
            stack.enter_context(mock.patch.object(Policy, "needs_grad", TrainedModel.needs_grad))
        yield


def _switching(pack: Any, recipe: Any, scratch: Path) -> list[dict[str, Any]]:
    """Return milliseconds to activate another adapter, by the number of members."""
    rows = []
    for count in PACK_SIZES:
        while len(pack.members) < count:
            pack.add(recipe, _run_dir(scratch, f"member{len(pack.members)}"))
        times = []
        for _ in range(REPEATS):
            start = time.process_time()
            for member in pack.members:
                member.policy.activate()
            times.append((time.process_time() - start) / count)
        rows.append({"members": count, "milliseconds": round(1000 * statistics.median(times), 3)})
        print(f"{count:>4} members  {rows[-1]['milliseconds']:.2f} ms a switch")
    return rows


if __name__ == "__main__":
    main()
