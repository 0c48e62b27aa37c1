"""Stage 1: the trainer and the transformers engine; neither vLLM nor Ray is needed."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.core.paths import PROJECT
from tests.gpu import ours
from tests.gpu.bench import Bench, flops_per_token
from tests.gpu.bench import card as card
from tests.gpu.shapes import QWEN3_06B, QWEN3_4B, QWEN25_05B, Shape, tiny

# prime-rl's committed baselines on one H100, LoRA r16, sequences of 16k: tokens/s and GiB.
PUBLISHED = {"qwen3-0.6b": (13_342, 5.15), "qwen3-4b": (6_229, 23.3)}
PROMPT, COMPLETION, GROUP = 128, 256, 4
MIX: list[dict[str, Any]] = [
    {ours.RANK: 32, ours.LR: 3e-5},
    {ours.RANK: 8, ours.LR: 1e-4, "trainer.target_modules": "attention"},
    {ours.RANK: 16, ours.LR: 3e-4, ours.ALPHA: 16},
    {ours.RANK: 64, ours.LR: 1e-5, "trainer.target_modules": "mlp"},
]


def tests(bench: Bench) -> None:
    """Run the tests marked `gpu` and record each outcome."""
    import pytest

    outcomes: dict[str, Any] = {}

    class Recorder:
        def pytest_runtest_logreport(self, report: Any) -> None:
            name = report.nodeid.partition("tests/gpu/")[2] or report.nodeid
            if report.when == "call" or report.outcome != "passed":
                outcomes[name] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
                if report.failed:
                    bench.errors.append(f"{name}: {report.outcome}")
                    outcomes[name]["why"] = report.longreprtext[-3000:]
                bench.note("tests", outcomes)

        def pytest_runtest_logfinish(self) -> None:
            bench.free()

    # A separate configuration: the project's requires plugins and a version that may be missing
    # here.
    config = bench.folder("pytest") / "pytest.ini"
    config.write_text("[pytest]\nmarkers =\n    gpu: needs a CUDA device\n    slow: slow\n")
    os.environ["NOREGRET_GPU_TESTS"] = bench.device
    status = pytest.main(
        [
            "-c",
            str(config),
            "--rootdir",
            str(PROJECT),
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
            "-m",
            "gpu",
            "-q",
            str(PROJECT / "tests" / "gpu"),
        ],
        plugins=[Recorder()],
    )
    counts = [row["outcome"] for row in outcomes.values()]
    bench.note("counts", {outcome: counts.count(outcome) for outcome in sorted(set(counts))})
    if status not in (0, 1) or not counts:
        bench.errors.append(f"pytest ended with {int(status)} after {len(counts)} tests")
        bench.note("status", int(status))


def update(bench: Bench) -> None:
    """Time the update alone, with each recipe key that changes how it is computed."""
    model = bench.write_model("qwen2.5-0.5b", QWEN25_05B)
    peak = bench.peak_flops()
    bench.note("peak_tflops", round(peak / 1e12, 3))
    many, some = bench.size((512, 128), (16, 8))
    budgets = bench.size((65_536, 32_768, 16_384, 8_192, 4_096), (1_024, 256))
    variants: list[tuple[str, int, dict[str, Any]]] = [
        ("512 sequences", many, {}),
        ("checkpointing off", some, {ours.CHECKPOINTING: "false"}),
        *((f"budget {budget}", some, {ours.TOKENS: budget}) for budget in budgets),
        *(
            (
                f"budget {budget}, checkpointing off",
                some,
                {ours.TOKENS: budget, ours.CHECKPOINTING: "false"},
            )
            for budget in budgets[-2:]
        ),
        ("rank 1", some, {ours.RANK: 1}),
        ("float32", some, {ours.DTYPE: "float32"}),
        (
            "deterministic",
            some,
            {"deterministic": "true"},
        ),  # last: it is a setting of the whole process
    ]
    for name, count, keys in variants:
        bench.part(name, partial(_update, bench, model, count, peak, keys))


def _update(
    bench: Bench, model: Path, count: int, peak: float, keys: dict[str, Any]
) -> dict[str, Any]:
    prompt, completion = bench.size((PROMPT, COMPLETION), (32, 16))
    recipe = bench.recipe(model, count // GROUP, GROUP, prompt, completion, **keys)
    with (
        ours.opened([recipe], bench.folder(f"run{time.time_ns()}")) as (pack, members),
        ours.synthetic(pack),
    ):
        ours.step(pack, members)
        row = timed_update(bench, pack, members, count, (prompt, completion))
    shape = bench.size(QWEN25_05B, tiny(QWEN25_05B))
    needed = flops_per_token(shape, prompt + completion) * row["tokens_per_second"]
    return {"share_of_peak": round(needed / peak, 4), **row, "sequences": count, **keys}


def timed_update(
    bench: Bench,
    pack: Any,
    members: list[Any],
    sequences: int,
    lengths: Sequence[int],
    group: int = GROUP,
) -> dict[str, Any]:
    """Time a training step without its rollout.

    Records seconds, tokens a second (a shared prompt counts once) and peak GiB.
    """
    rows, seconds, peak = bench.timed(lambda: ours.step(pack, members))
    row = rows[members[0]]
    # The step is timed as a whole, because the GPU finishes its last kernels after the span that
    # started them.
    work = seconds - row["timing_s/rollout"]
    tokens = len(members) * (sequences * lengths[1] + sequences // group * lengths[0])
    return {
        "tokens_per_second": round(tokens / work, 1),
        "peak_gb": peak,
        "seconds": round(work, 4),
        "update_s": round(row["timing_s/update"], 4),
        "tokens": tokens,
        "sequence_tokens_per_second": round(len(members) * sequences * sum(lengths) / work, 1),
    }


def profile(bench: Bench) -> None:
    """Profile a small and a large update: kernels, launches, and the device's busy time."""
    model = bench.write_model("qwen2.5-0.5b", QWEN25_05B)
    prompt, completion = bench.size((PROMPT, COMPLETION), (32, 16))
    for prompts in bench.size((2, 32), (2, 4)):
        sequences, recipe = GROUP * prompts, bench.recipe(model, prompts, GROUP, prompt, completion)
        with (
            ours.opened([recipe], bench.folder(f"run{sequences}")) as (pack, members),
            ours.synthetic(pack),
        ):
            ours.step(pack, members)
            timed = timed_update(bench, pack, members, sequences, (prompt, completion))
            bench.note(f"{sequences} sequences without the profiler", timed)
            bench.part(f"{sequences} sequences", partial(_profiled, bench, pack, members))


def _profiled(bench: Bench, pack: Any, members: list[Any]) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = bench.device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profiler(activities=kinds) as profiled:
        seconds = bench.timed(lambda: ours.step(pack, members))[1]
    events = profiled.key_averages()
    # Spans that torch names (an optimizer's step) have device time too: that of the kernels inside.
    on_device = [
        event
        for event in events
        if event.device_type.name == bench.device.upper() and not event.is_user_annotation
    ]
    time_of = {
        id(event): event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in on_device
    }
    busiest = sorted(on_device, key=lambda event: time_of[id(event)], reverse=True)
    return {
        "wall_s": round(seconds, 4),
        "busy_s": round(sum(time_of[id(event)] for event in busiest) / 1e6, 4),
        "launches": sum(event.count for event in events if "LaunchKernel" in event.key),
        "copies_that_wait": sum(
            e.count for e in events if e.key in ("cudaMemcpyAsync", "cudaStreamSynchronize")
        ),
        "top": [
            {
                "name": event.key[:100],
                "seconds": round(time_of[id(event)] / 1e6, 5),
                "calls": event.count,
            }
            for event in busiest[:25]
        ],
    }


def long_06b(bench: Bench) -> None:
    """Measure Qwen3-0.6B at sequences of 16k, LoRA r16, beside prime-rl's published baseline."""
    _long(bench, "qwen3-0.6b", QWEN3_06B)


def long_4b(bench: Bench) -> None:
    """Measure Qwen3-4B at sequences of 16k, LoRA r16, beside prime-rl's published baseline."""
    _long(bench, "qwen3-4b", QWEN3_4B)


def _long(bench: Bench, name: str, shape: Shape) -> None:
    tokens_per_second, gb = PUBLISHED[name]
    bench.note(
        "published",
        {"tokens_per_second": tokens_per_second, "peak_gb": gb, "by": "prime-rl, one H100"},
    )
    model = bench.write_model(name, shape)
    peak = bench.peak_flops()
    lengths = bench.size((1_024, 15_360), (32, 96))
    for budget in (sum(lengths), 2 * sum(lengths)):
        bench.part(
            f"budget {budget}", partial(_long_update, bench, model, shape, lengths, budget, peak)
        )


def _long_update(
    bench: Bench, model: Path, shape: Shape, lengths: tuple[int, int], budget: int, peak: float
) -> dict[str, Any]:
    recipe = bench.recipe(model, 1, 2, *lengths, **{ours.RANK: 16, ours.TOKENS: budget})
    with (
        ours.opened([recipe], bench.folder(f"run{budget}")) as (pack, members),
        ours.synthetic(pack),
    ):
        ours.step(pack, members)
        row = timed_update(bench, pack, members, 2, lengths, group=2)
    needed = (
        flops_per_token(bench.size(shape, tiny(shape)), sum(lengths)) * row["tokens_per_second"]
    )
    return {"share_of_peak": round(needed / peak, 4), **row}


def packs(bench: Bench) -> None:
    """Time updates of 1, 2, 4 and 8 mixed members, one after the other, at several sizes."""
    model = bench.write_model("qwen2.5-0.5b", QWEN25_05B)
    for sequences in bench.size((16, 64, 512), (8, 16)):
        _pack_updates(bench, model, sequences, *bench.size((PROMPT, COMPLETION), (32, 16)))
        bench.free()


def _pack_updates(bench: Bench, model: Path, sequences: int, *lengths: int) -> None:
    recipes = [
        bench.recipe(model, sequences // GROUP, GROUP, *lengths, **keys) for keys in mixed(8)
    ]
    with (
        ours.opened(recipes, bench.folder(f"runs{sequences}")) as (pack, members),
        ours.synthetic(pack),
    ):
        ours.step(pack, members)
        for count in (1, 2, 4, 8):
            work = partial(timed_update, bench, pack, members[:count], sequences, lengths)
            bench.part(f"{sequences} sequences, {count} members", work, keep_cache=True)


def mixed(count: int) -> list[dict[str, Any]]:
    """Return keys of members that differ in rank, alpha, learning rate, targets and seed."""
    return [{**MIX[index % len(MIX)], "seed": index} for index in range(count)]


def close(bench: Bench) -> None:
    """Record the memory left after a pack was closed.

    PPO, full fine-tuning and GRPO train two steps each.
    """
    model = bench.write_model("qwen2.5-0.5b", QWEN25_05B)
    prompt, completion = bench.size((PROMPT, 32), (32, 8))
    ends: dict[str, Any] = {"trainer__max_steps": 2, "trainer__eval_batch_size": 64}
    variants: dict[str, dict[str, Any]] = {
        "grpo": {},
        "ppo": {"trainer__algorithm__advantage_estimator": "gae"},
        "full": {ours.RANK: 0, ours.LR: 1e-6},
    }
    for name, keys in variants.items():
        recipe = bench.recipe(model, 4, GROUP, prompt, completion, **ends, **keys)
        recipe.data.val_data = [str(_few(bench, prompt))]
        bench.part(name, partial(_to_the_end, bench, recipe, name))


def _few(bench: Bench, tokens: int) -> Path:
    """Return a file with 16 problems."""
    lines = bench.write_problems(tokens).read_text().splitlines(keepends=True)
    path = bench.scratch / f"few{tokens}.jsonl"
    path.write_text("".join(lines[:16]))
    return path


def _to_the_end(bench: Bench, recipe: Any, name: str) -> dict[str, Any]:
    before = ours.live_bytes(bench.device)
    rows, seconds, peak = bench.timed(lambda: ours.train(recipe, bench.folder(name)))
    row = rows[-1]
    left = ours.live_bytes(bench.device) - before
    return {
        "seconds": round(seconds, 2),
        "peak_gb": peak,
        "left_after_close_mb": round(left / 2**20, 3),
        **{
            key: row[key]
            for key in ("grad_norm", "timing_s/rollout", "timing_s/update", "eval/accuracy")
        },
    }


def learns_float32(bench: Bench) -> None:
    """Train `recipes/quickstart.yaml` in float32 twice: it must learn and be reproducible."""
    _learns(bench, "float32")


def learns_bfloat16(bench: Bench) -> None:
    """Train it in bfloat16 twice."""
    _learns(bench, "bfloat16")


def learns_deterministic(bench: Bench) -> None:
    """Train it in bfloat16 with `deterministic: true`, for fewer steps.

    The repetition must be equal to the bit.
    """
    _learns(bench, "bfloat16", "deterministic=true", f"trainer.max_steps={bench.size(10, 2)}")


def _learns(bench: Bench, dtype: str, *keys: str) -> None:
    keys = (f"trainer.policy.model.dtype={dtype}", *keys)
    if bench.device == "cpu":
        small = [
            "trainer.max_steps=2",
            "trainer.train_batch_size=4",
            "trainer.policy_mini_batch_size=4",
        ]
        keys = (*small, *ours.tiny_gsm_data(bench.folder("data"), 16, 8), *keys)
    recipe = ours.quickstart(bench.device, *keys)
    rows: list[ours.Row] = []

    def first() -> dict[str, Any]:
        rows.extend(ours.train(recipe, bench.folder("first")))
        return {
            "accuracy": {
                int(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row
            },
            "on a CPU, float32": {0: 0.311, 16: 0.791, 32: 0.936},
            **{
                part: statistics.median(row[key] for row in rows if key in row)
                for part, key in (
                    ("step_s", "step_time"),
                    ("rollout_s", "timing_s/rollout"),
                    ("update_s", "timing_s/update"),
                )
            },
            "gap": rows[-1]["sampling/sampling_logp_difference/mean"],
            "peak_gb": bench.peak_gb(),
        }

    bench.part("run", first)
    steps = bench.size(10, 2)

    def again() -> list[ours.Row]:
        return ours.train(recipe, bench.folder("again"), until=lambda row: row["step"] == steps)

    bench.part("again", lambda: ours.first_difference(rows, again()))


def trl(bench: Bench) -> None:
    """Compare a step of TRL's GRPOTrainer with PEFT with ours at the same sizes.

    Both sample with transformers.
    """
    if find_spec("trl") is None:
        bench.note("skipped", "trl is not installed")
        return
    model = bench.write_model("qwen2.5-0.5b", QWEN25_05B)
    sizes = bench.size((64, PROMPT, 128), (8, 32, 8))
    our_steps = bench.part("ours", lambda: _our_steps(bench, model, *sizes))
    for name, checkpointing in (("trl", False), ("trl with checkpointing", True)):
        trl_steps = bench.part(
            name, partial(_trl_steps, bench, model, *sizes, checkpointing=checkpointing)
        )
        if our_steps and trl_steps:
            bench.note(f"{name} / ours", round(trl_steps["step_s"] / our_steps["step_s"], 2))


def _our_steps(
    bench: Bench, model: Path, sequences: int, prompt: int, completion: int
) -> dict[str, Any]:
    recipe = bench.recipe(model, sequences // GROUP, GROUP, prompt, completion)
    with ours.opened([recipe], bench.folder("ours")) as (pack, members):
        ours.step(pack, members)
        steps = [bench.timed(lambda: ours.step(pack, members)) for _ in range(2)]
    rows = [rows[members[0]] for rows, _, _ in steps]
    return {
        "step_s": round(statistics.median(seconds for _, seconds, _ in steps), 4),
        "rollout_s": round(statistics.median(row["timing_s/rollout"] for row in rows), 4),
        "peak_gb": max(peak for _, _, peak in steps),
    }


def _trl_steps(
    bench: Bench, model: Path, sequences: int, prompt: int, completion: int, *, checkpointing: bool
) -> dict[str, Any]:
    import torch
    from peft import LoraConfig

    from tests.benchmarks.trl_run import make_clock
    from tests.gpu.environment import reward

    library: Any = import_module("trl")
    datasets: Any = import_module("datasets")
    lines = bench.write_problems(prompt).read_text().splitlines()[: 4 * sequences]
    data = datasets.Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines])
    clock = make_clock({})
    arguments = library.GRPOConfig(
        output_dir=str(bench.folder(f"trl-{checkpointing}")),
        max_steps=3,
        use_cpu=bench.device == "cpu",
        bf16=True,
        per_device_train_batch_size=min(16, sequences),
        gradient_accumulation_steps=max(1, sequences // 16),
        num_generations=GROUP,
        max_completion_length=completion,
        beta=0.0,
        num_iterations=1,
        loss_type="dapo",
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        gradient_checkpointing=checkpointing,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": torch.bfloat16, "attn_implementation": "sdpa"},
    )
    trainer = library.GRPOTrainer(
        model=str(model),
        args=arguments,
        train_dataset=data,
        callbacks=[clock],
        reward_funcs=lambda completions, **_: [
            reward(turns[0]["content"], "0") for turns in completions
        ],
        peft_config=LoraConfig(
            r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    clock.watch(trainer)
    bench.free()
    trainer.train()
    steps = [end - begin for begin, end in zip(clock.begun, clock.ended, strict=True)][1:]
    return {
        "step_s": round(statistics.median(steps), 4),
        "rollout_s": round(statistics.median(clock.rollouts[1:]), 4),
        "mean_length": clock.lengths[-1],
        "peak_gb": bench.peak_gb(),
    }
