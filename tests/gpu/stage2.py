"""Stage 2: vLLM as the engine, on the trainer's GPU.

A process can start vLLM only once.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.gpu import ours
from tests.gpu.bench import Bench
from tests.gpu.bench import card as card
from tests.gpu.shapes import QWEN25_05B, TINY_GSM
from tests.gpu.stage1 import COMPLETION, GROUP, PROMPT, mixed

GAP, GAP_MAX = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"
SPARE = 20.0
"""Seconds that a run which stops by itself leaves of its section's time."""


def _recipe(bench: Bench, sequences: int, **keys: Any) -> Any:
    """Return a recipe of `sequences` a step on the random model, sampled by vLLM."""
    model = bench.write_model("qwen2.5-0.5b", QWEN25_05B)
    prompt, completion = bench.size((PROMPT, COMPLETION), (32, 16))
    keys_here: dict[str, Any] = {
        "generator.backend": "vllm",
        "generator.max_num_seqs": bench.size(1024, 64),
    }
    keys_here |= bench.size({}, {ours.DTYPE: "float32"})  # vLLM's native dtype on a CPU
    return bench.recipe(model, sequences // GROUP, GROUP, prompt, completion, **keys_here, **keys)


@contextlib.contextmanager
def _opened(bench: Bench, recipes: list[Any], name: str) -> Iterator[tuple[Any, list[Any], float]]:
    """Open a pack; yield it, its members, and the seconds to start.

    Start and end are recorded.
    """
    context = ours.opened(recipes, bench.folder(name))
    (pack, members), start, _ = bench.timed(context.__enter__)
    bench.note(f"{name}, start", {"seconds": round(start, 2), **bench.memory()})
    try:
        yield pack, members, start
    finally:
        seconds = bench.timed(lambda: context.__exit__(None, None, None))[1]
        bench.note(f"{name}, close", {"seconds": round(seconds, 2), **bench.memory()})


def engine(bench: Bench) -> None:
    """Measure start, log-probability parity, and ten steps.

    The engine sleeps while the trainer works.
    """
    _sleeping_steps(bench, _recipe(bench, bench.size(64, 8), **{ours.LR: 1e-3}))
    bench.free()
    bench.note("left", bench.memory())


def _sleeping_steps(bench: Bench, recipe: Any) -> None:
    with _opened(bench, [recipe], "engine") as (pack, (member,), _):
        bench.part("parity", lambda: _parity(bench, pack, member))
        bench.part("sleep", lambda: _sleep(bench, pack))
        for number in range(1, bench.size(11, 3)):
            bench.part(f"step {number}", lambda: _step(bench, pack, [member]), keep_cache=True)
        bench.part("parity afterwards", lambda: _parity(bench, pack, member, new_weights=False))


def _parity(bench: Bench, pack: Any, member: Any, *, new_weights: bool = True) -> dict[str, Any]:
    """Return the differences between the log-probabilities of engine and trainer."""
    import torch

    if new_weights:
        ours.shake(member)
        ours.publish(pack, member)
    prompts = [
        [10 + (7 * index + k) % 700 for k in range(24)] for index in range(bench.size(16, 4))
    ]
    groups, seconds, _ = bench.timed(
        lambda: ours.sample(pack, member, prompts, 4, bench.size(COMPLETION, 16))
    )
    samples = [sample for group in groups for sample in group]
    texts = (
        [prompt for prompt in prompts for _ in range(4)],
        [sample.token_ids for sample in samples],
    )
    with ours.asleep(pack), torch.no_grad():
        values = ours.logprobs(pack, member, ours.batch_of(*texts)).cpu()
    engines = [torch.tensor(sample.logprobs) for sample in samples]
    gaps = torch.cat(
        [(one - row[: len(one)]).abs() for one, row in zip(engines, values, strict=True)]
    )
    return {
        "mean_gap": float(gaps.mean()),
        "largest_gap": float(gaps.max()),
        "tokens": len(gaps),
        "tokens_per_second": round(len(gaps) / seconds),
    }


def _sleep(bench: Bench, pack: Any) -> dict[str, Any]:
    before, context = bench.memory(), ours.asleep(pack)
    slept = bench.timed(context.__enter__)[1]
    asleep = bench.memory()
    woken = bench.timed(lambda: context.__exit__(None, None, None))[1]
    return {
        "sleep_s": round(slept, 3),
        "wake_s": round(woken, 3),
        "before": before,
        "asleep": asleep,
        "awake": bench.memory(),
    }


def _step(bench: Bench, pack: Any, members: list[Any]) -> dict[str, Any]:
    rows, seconds, peak = bench.timed(lambda: ours.step(pack, members))
    row = rows[members[0]]
    return {
        "seconds": round(seconds, 3),
        **{name: round(row[f"timing_s/{name}"], 4) for name in ("rollout", "update", "sync")},
        "mean_gap": row[GAP],
        "largest_gap": row[GAP_MAX],
        "peak_gb": peak,
        **bench.memory(),
    }


def sync(bench: Bench) -> None:
    """Time the publication of an adapter through files and in memory, by rank."""
    _sync(bench, "disk", "memory")


def sync_merge(bench: Bench) -> None:
    """Time the publication of an adapter merged into all weights, by rank."""
    _sync(bench, "merge")


def _sync(bench: Bench, *modes: str) -> None:
    ranks = bench.size((1, 32, 256), (1, 32))
    keys = [{ours.RANK: rank, f"{ours.LORA}.sync": mode} for mode in modes for rank in ranks]
    most = {} if modes == ("merge",) else {"generator.max_lora_rank": max(ranks)}
    recipes = [_recipe(bench, 8, **most, **one) for one in keys]
    with _opened(bench, recipes, "engine") as (pack, members, _):
        for one, member in zip(keys, members, strict=True):
            name = f"{one[f'{ours.LORA}.sync']}, rank {one[ours.RANK]}"
            bench.part(name, partial(_published, bench, pack, member), keep_cache=True)


def _published(bench: Bench, pack: Any, member: Any) -> dict[str, float]:
    seconds = []
    for seed in range(bench.size(6, 2)):
        ours.shake(member, seed)
        seconds.append(bench.timed(lambda: ours.publish(pack, member))[1])
    return {
        "median_ms": round(1e3 * statistics.median(seconds), 2),
        "fastest_ms": round(1e3 * min(seconds), 2),
    }


def recipe(bench: Bench) -> None:
    """Train `recipes/gsm8k_lora.yaml` on one GPU for five steps, CUDA graphs on.

    The model has random weights.
    """
    model = bench.write_model("qwen2.5-0.5b", QWEN25_05B)
    _train(
        bench,
        model,
        f"trainer.max_steps={bench.size(5, 2)}",
        "trainer.eval_before_train=false",
        "trainer.eval_interval=0",
        "trainer.sync_tolerance=1e9",
    )


def recipe_eager(bench: Bench) -> None:
    """Train it without CUDA graphs, two steps."""
    model = bench.write_model("qwen2.5-0.5b", QWEN25_05B)
    _train(
        bench,
        model,
        "trainer.max_steps=2",
        "trainer.eval_before_train=false",
        "trainer.eval_interval=0",
        "trainer.sync_tolerance=1e9",
        "generator.enforce_eager=true",
    )


def real_model(bench: Bench) -> None:
    """Train it on the model of `--model` until the section's time is over.

    It evaluates every five steps.
    """
    model = bench.size(bench.model, bench.model or TINY_GSM)
    if model is None:
        bench.note("skipped", "no --model was given")
        return
    files = [
        (key, f"{bench.data}/{name}.parquet")
        for key, name in (("train", "train"), ("val", "validation"))
    ]
    _train(
        bench,
        model,
        f"trainer.max_steps={bench.size(1000, 2)}",
        "trainer.eval_interval=5",
        "trainer.ckpt_interval=0",
        *(f"data.{key}_data=[{file}]" for key, file in files if bench.data),
    )


def _train(bench: Bench, model: Path, *keys: str) -> None:
    """Train `recipes/gsm8k_lora.yaml` in one process, on the embedded problems.

    Every step's row is recorded.
    """
    one_gpu = [
        f"trainer.policy.model.path={model}",
        f"trainer.placement.device={bench.device}",
        *ours.tiny_gsm_data(bench.folder("data"), bench.size(2048, 16), 128),
    ]
    tiny = [
        "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=4",
        "generator.max_num_seqs=64",
        "generator.max_input_length=64",
        "generator.sampling_params.max_generate_length=16",
        "generator.eval_sampling_params.max_generate_length=16",
    ]
    chosen = ours.compose("gsm8k_lora", [*one_gpu, *bench.size([], tiny), *keys])
    rows: list[ours.Row] = []

    def until(row: ours.Row) -> bool:
        rows.append(row)
        kept = {name: value for name, value in row.items() if name.startswith(SHOWN)}
        bench.note(f"step {row['step']}", kept)
        # Another step must fit, with an evaluation.
        return bench.left() < SPARE + 1.5 * row.get("step_time", 0.0)

    bench.part("run", lambda: _run(bench, chosen, until, rows))


SHOWN = (
    "step",
    "timing_s/",
    "perf/",
    "reward",
    "eval/accuracy",
    "completions/mean_length",
    "grad_norm",
    GAP,
)


def _run(
    bench: Bench, chosen: Any, until: Callable[[ours.Row], bool], rows: list[ours.Row]
) -> dict[str, Any]:
    ours.train(chosen, bench.folder("run"), until=until)
    names = (
        "step_time",
        "timing_s/rollout",
        "timing_s/logprobs",
        "timing_s/update",
        "timing_s/sync",
        "perf/tokens_per_second",
        "perf/mfu",
    )
    return {
        **{
            name: statistics.median(row[name] for row in rows if name in row)
            for name in names
            if any(name in row for row in rows)
        },
        "peak_gb": bench.peak_gb(),
    }


def packs_small(bench: Bench) -> None:
    """Time steps of 8, 4 and 2 mixed members, packed and one after the other.

    Each has 64 sequences.
    """
    _pack_steps(bench, bench.size(64, 8))


def packs_large(bench: Bench) -> None:
    """Time the same steps with 512 sequences each."""
    _pack_steps(bench, bench.size(512, 16))


def _pack_steps(bench: Bench, sequences: int) -> None:
    recipes = [
        _recipe(bench, sequences, **{"generator.max_lora_rank": 64, **keys}) for keys in mixed(8)
    ]
    # The best of several rounds: first steps are slower, which matters where steps are short.
    name, rounds = f"{sequences} sequences", 2 if sequences < 512 else 1
    with _opened(bench, recipes, name) as (pack, members, start):
        bench.part(f"{name}, warm-up", lambda: _step(bench, pack, members), keep_cache=True)
        alone = [_best(bench, pack, [member], rounds) for member in members]
        bench.note(
            f"{name}, alone", {"seconds": sum(step["seconds"] for step in alone), "steps": alone}
        )
        for count in (8, 4, 2):
            apart = sum(step["seconds"] for step in alone[:count])
            work = partial(_together, bench, pack, members[:count], rounds, apart, start)
            bench.part(f"{name}, {count} members", work, keep_cache=True)


def _best(bench: Bench, pack: Any, members: list[Any], rounds: int) -> dict[str, Any]:
    return min(
        (_step(bench, pack, members) for _ in range(rounds)),
        key=lambda step: float(step["seconds"]),
    )


def _together(
    bench: Bench, pack: Any, members: list[Any], rounds: int, apart: float, start: float
) -> dict[str, Any]:
    """Record the speedup of a joint step over steps one after the other.

    That of whole runs, with starts, is recorded too.
    """
    step, count = _best(bench, pack, members, rounds), len(members)
    runs = {
        f"speedup_of_{n}_steps": round(
            (count * start + n * apart) / (start + n * step["seconds"]), 2
        )
        for n in (10, 100)
    }
    return {"speedup": round(apart / step["seconds"], 2), **runs, **step}
