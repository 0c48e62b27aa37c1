"""Whether a recipe fits the GPUs, overrides that make it fit, and how GPUs are named."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from harness.config import recipe as recipes
from harness.config.schema import Recipe
from harness.core.errors import UserError
from rltrain.distributed import gpus
from rltrain.distributed import placement as parallel
from rltrain.distributed.gpus import Gpus, local_gpus
from rltrain.models.memory import GIB
from rltrain.tools.fit import check_fit, gpus_to_plan_for, memory_table, named_gpus, note_fit

QWEN = "trainer.policy.model.path=Qwen/Qwen2.5-"
MACHINE = Gpus((4,), 80 * GIB)


def base(*overrides: str) -> Recipe:
    return recipes.load("base", [f"{QWEN}0.5B-Instruct", "ray.address=null", *overrides])


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("text", "asked", "expected"),
    [
        ("80", 4, Gpus((4,), 80 * GIB)),
        ("1x24", 4, Gpus((1,), 24 * GIB)),
        ("79.5", 0, Gpus((1,), int(79.5 * GIB))),
        ("8x141", 1, Gpus((8,), 141 * GIB)),
    ],
)
def test_gpus_are_named_by_memory_and_number(text: str, asked: int, expected: Gpus) -> None:
    assert named_gpus(text, asked) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "x80", "0x80", "8x", "-1", "80GB", "nan", "1e9", "8x80x2"]
)
def test_what_names_no_gpus_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        named_gpus(text, 1)


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (None, [81559, 24564]),
        ("1", [24564]),
        ("GPU-aa", [81559]),
        ("0,1", [81559, 24564]),
        ("-1", []),
        ("", []),
    ],
)
def test_memory_of_the_gpus_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, allowed: str | None, expected: list[int]
) -> None:
    def answer(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, "0, GPU-aa1, 81559\n1, GPU-bb2, 24564\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    if allowed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert gpus.visible_memory() == [size * 2**20 for size in expected]


def test_gpus_whose_memory_nothing_says_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "visible_gpus", lambda: 2)
    monkeypatch.setattr(gpus, "visible_memory", list)
    assert local_gpus() == Gpus((2,), None)
    check_fit(base(f"{QWEN}32B"), local_gpus())  # what is not known refuses nothing


@pytest.mark.parametrize(
    ("overrides", "there", "expected"),
    [
        ([], 0, None),
        ([], 2, Gpus((2,), None)),
        (["trainer.placement.device=cpu"], 2, None),
        (["trainer.placement.device=cuda"], 0, Gpus((0,), None)),
        (
            ["trainer.placement.policy_num_gpus_per_node=2", "generator.num_inference_engines=2"],
            0,
            Gpus((0,), None),
        ),
        (["ray.address=10.0.0.1:6379"], 2, Gpus((), None)),
    ],
)
def test_gpus_that_a_dry_run_plans_for(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], there: int, expected: Gpus | None
) -> None:
    monkeypatch.setattr(parallel, "visible_gpus", lambda: there)
    monkeypatch.setattr(gpus, "visible_memory", list)
    assert gpus_to_plan_for(base(*overrides), None) == expected


def test_gpu_memory_is_refused_for_a_cpu_and_counts_what_is_asked() -> None:
    with pytest.raises(UserError, match="uses none"):
        gpus_to_plan_for(base("trainer.placement.device=cpu"), "80")
    apart = [
        "trainer.placement.colocate_all=false",
        "generator.inference_engine_tensor_parallel_size=2",
    ]
    assert gpus_to_plan_for(base(*apart), "80") == Gpus((3,), 80 * GIB)


def test_the_table_adds_up_and_names_the_engines_gpus() -> None:
    text = memory_table(base("trainer.placement.colocate_all=false"), MACHINE)
    head, *rows, total = text.splitlines()
    assert head == "memory of a run, GiB on each of 2 GPUs"
    assert rows[0].split() == ["sampling", "training", "engine"]
    assert total.split()[:4] == ["in", "all,", "of", "80.00"]
    engine = [
        float(row.split()[-1]) for row in rows[1:] if row.strip().startswith(("engine:", "CUDA"))
    ]
    assert sum(engine) == pytest.approx(float(total.split()[-1]), abs=0.03)


@pytest.mark.parametrize(
    ("overrides", "gpus", "said"),
    [
        ([], Gpus((1,), None), "--gpu-memory 80"),
        ([f"{QWEN}9B"], Gpus((1,), 80 * GIB), "no config.json of"),
    ],
)
def test_a_table_that_cannot_be_made_says_why(overrides: list[str], gpus: Gpus, said: str) -> None:
    assert said in memory_table(base(*overrides), gpus)


@pytest.mark.parametrize(
    ("overrides", "gpus", "fix"),
    [
        (
            ["trainer.max_tokens_per_microbatch=null"],
            Gpus((1,), 24 * GIB),
            "trainer.max_tokens_per_microbatch=auto",
        ),
        (
            ["trainer.gradient_checkpointing=false", "trainer.max_tokens_per_microbatch=65536"],
            Gpus((1,), 80 * GIB),
            "trainer.max_tokens_per_microbatch=auto, or trainer.gradient_checkpointing=true",
        ),
        (
            [f"{QWEN}14B"],
            Gpus((1,), 80 * GIB),
            "generator.gpu_memory_utilization=0.6, or generator.max_num_seqs=64",
        ),
        (
            [f"{QWEN}7B", "trainer.policy.model.lora.rank=0"],
            MACHINE,
            "trainer.placement.policy_num_gpus_per_node=4 generator.num_inference_engines=4",
        ),
        (
            [f"{QWEN}32B"],
            MACHINE,
            "trainer.placement.colocate_all=false generator.num_inference_engines=3",
        ),
        (
            ["trainer.placement.colocate_all=false", "generator.num_inference_engines=4"],
            Gpus((2,), 80 * GIB),
            "generator.num_inference_engines=1",
        ),
        ([f"{QWEN}32B"], Gpus((1,), 24 * GIB), "a smaller model"),
        (["trainer.placement.device=cuda"], Gpus((0,), 24 * GIB), "a smaller model"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    overrides: list[str], gpus: Gpus, fix: str
) -> None:
    recipe = base(*overrides)
    with pytest.raises(UserError, match="does not fit the GPUs") as caught:
        check_fit(recipe, gpus)
    assert caught.value.fix is not None
    assert fix in caught.value.fix
    if "=" in fix:
        for one in caught.value.fix.split(", or "):
            check_fit(recipes.with_overrides(recipe, one.split()), gpus)


def test_several_changes_are_named_where_none_alone_is_enough() -> None:
    recipe = base(
        "trainer.max_tokens_per_microbatch=null",
        "generator.gpu_memory_utilization=1.0",
        "generator.max_num_seqs=8192",
    )
    gpus = Gpus((1,), 12 * GIB)
    with pytest.raises(UserError) as caught:
        check_fit(recipe, gpus)
    assert caught.value.fix is not None
    changes = caught.value.fix.split()
    assert changes[0] == "trainer.max_tokens_per_microbatch=auto"
    assert len(changes) == 2
    check_fit(recipes.with_overrides(recipe, changes), gpus)


def test_a_pack_too_large_is_made_smaller() -> None:
    sweep = {
        "space": {"trainer.policy.optimizer_config.lr": {"choices": [1e-5, 1e-4]}},
        "pack_size": 64,
    }
    recipe = recipes.with_values(
        base(f"{QWEN}7B", "trainer.policy.model.lora.rank=128"), {"sweep": sweep}
    )
    with pytest.raises(UserError) as caught:
        check_fit(recipe, Gpus((1,), 80 * GIB))
    assert caught.value.fix is not None
    assert "sweep.pack_size=4" in caught.value.fix


def test_a_run_that_is_started_gets_a_note_where_a_dry_run_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small, large = Gpus((1,), 24 * GIB), Gpus((1,), 80 * GIB)
    note_fit(base(f"{QWEN}7B"), large)
    assert capsys.readouterr().err == ""
    note_fit(base(f"{QWEN}7B"), small)
    assert capsys.readouterr().err.startswith("note: by estimate this does not fit the GPUs")
