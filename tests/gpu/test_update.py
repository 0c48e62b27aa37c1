"""Test updates on a GPU.

They are compared with the CPU, with checkpointing and with themselves. Tests also cover running out
of memory and memory that is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu import ours
from tests.gpu.shapes import write_problems
from tests.gpu.test_logprobs import distance

if TYPE_CHECKING:
    from tests.gpu.conftest import OpenPack

pytestmark = pytest.mark.gpu


def weights(member: Any) -> dict[str, Any]:
    """Return a copy of a member's adapter."""
    return {
        name: parameter.detach().cpu().clone() for name, parameter in ours.adapter(member).items()
    }


def test_the_optimizers_step_is_the_cpus(open_pack: OpenPack) -> None:
    import torch

    results = []
    for pack, (member,) in (open_pack({ours.LR: 1e-3}), open_pack({ours.LR: 1e-3}, on="cpu")):
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            gradients = {
                n: torch.randn(p.shape, generator=generator)
                for n, p in ours.adapter(member).items()
            }
            row = ours.optimize(pack, member, gradients)
        results.append((weights(member), row["grad_norm"]))
    (gpu, norm), (cpu, cpu_norm) = results
    assert distance(gpu, cpu) < 1e-5
    assert norm == pytest.approx(cpu_norm, rel=1e-4)


def test_a_training_step_is_the_cpus(open_pack: OpenPack) -> None:
    results = []
    for pack, (member,) in (open_pack({ours.LR: 1e-4}), open_pack({ours.LR: 1e-4}, on="cpu")):
        before = weights(member)
        row = ours.step(pack, [member])[member]
        after = weights(member)
        results.append(({name: after[name] - before[name] for name in after}, row))
    (gpu, row), (cpu, cpu_row) = results
    for name in ("grad_norm", "entropy", "sampling/sampling_logp_difference/mean"):
        assert row[name] == pytest.approx(cpu_row[name], rel=1e-3), name
    # Adam's first step is the learning rate times the gradient's sign, which may depend on the last
    # digit.
    assert distance(gpu, cpu) < 0.05


def test_checkpointing_changes_no_result(open_pack: OpenPack) -> None:
    results = []
    for checkpointing in ("true", "false"):
        pack, (member,) = open_pack({ours.CHECKPOINTING: checkpointing, "deterministic": "true"})
        row = ours.step(pack, [member])[member]
        results.append((weights(member), row["grad_norm"]))
    (on, norm), (off, plain_norm) = results
    assert distance(on, off) < 1e-5
    assert norm == pytest.approx(plain_norm, rel=1e-5)


def test_nothing_waits_for_the_gpu_within_a_mini_batch(
    open_pack: OpenPack, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if device == "cpu":
        pytest.skip("a CPU does not run asynchronously")
    from rltrain import step
    from rltrain.algorithms.policy import Policy

    pack, (member,) = open_pack(
        {ours.DTYPE: "bfloat16", "trainer.micro_train_batch_size_per_gpu": 2}
    )
    ours.step(pack, [member])
    loss, add, passes = Policy.loss, step.add_statistics, []

    def watched(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        return loss(*arguments)

    def noted(*arguments: Any) -> None:
        add(*arguments)
        torch.cuda.set_sync_debug_mode("default")
        passes.append(arguments)

    monkeypatch.setattr(Policy, "loss", watched)
    monkeypatch.setattr(step, "add_statistics", noted)
    try:
        ours.step(pack, [member])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(passes) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deterministic_run_comes_out_the_same(device: str, dtype: str, tmp_path: Path) -> None:
    keys = [
        *ours.tiny_gsm_data(tmp_path / "data", 32, 8),
        f"{ours.DTYPE}={dtype}",
        "deterministic=true",
        "trainer.train_batch_size=8",
        "trainer.policy_mini_batch_size=4",
        "trainer.max_steps=3",
    ]
    recipe = ours.quickstart(device, *keys)
    one, other = (ours.train(recipe, tmp_path / name) for name in ("one", "other"))
    difference = ours.first_difference(one, other)
    assert difference["steps_compared"] == 4
    assert difference["same_bits"], difference
    files = [
        (tmp_path / name / "adapter/final/adapter_model.safetensors").read_bytes()
        for name in ("one", "other")
    ]
    assert files[0] == files[1]


def test_a_member_out_of_memory_leaves_the_others_as_they_are(
    open_pack: OpenPack, model_of: Callable[..., Path], device: str
) -> None:
    import torch

    # The larger member's gradients and moments of AdamW need most of the memory. The vocabulary is
    # small, so that logits do not.
    model = model_of(layers=4, vocab_size=4096)
    members = [{ours.RANK: rank, "seed": rank, "deterministic": "true"} for rank in (4, 512, 8)]
    results = []
    for fails in (True, False):
        pack, (first, large, last) = open_pack(*members, model=model)
        failures = ours.contain_failures(pack)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ours.step(pack, [first, last])
        with out_of_memory(device, large) if fails else contextlib.nullcontext():
            rows = ours.step(pack, [first, large, last])
        assert set(rows) == ({first, last} if fails else {first, large, last})
        assert list(failures) == ([large] if fails else [])
        assert all("out of memory" in str(error) for error in failures.values())
        results.append([weights(first), weights(last)])
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@contextlib.contextmanager
def out_of_memory(device: str, member: Any) -> Iterator[None]:
    """Limit the GPU's memory to little more than was used so far.

    On a CPU the member's update raises an out-of-memory error.
    """
    import torch

    if device == "cpu":
        with ours.fails_to_update(member, torch.OutOfMemoryError("out of memory")):
            yield
        return
    torch.cuda.empty_cache()
    limit = torch.cuda.max_memory_allocated() + 128 * 2**20
    torch.cuda.set_per_process_memory_fraction(
        limit / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    "keys", [{}, {"trainer.algorithm.advantage_estimator": "gae"}, {ours.RANK: 0}]
)
def test_a_closed_pack_leaves_no_memory(
    device: str, model_of: Callable[..., Path], keys: dict[str, Any], tmp_path: Path
) -> None:
    path, data = model_of(), write_problems(tmp_path, 32, rows=16)
    lines = ours.overrides(
        path,
        data,
        device,
        prompts=2,
        samples=4,
        prompt=32,
        completion=8,
        **keys,
        trainer__max_steps=1,
    )
    recipe = ours.compose("base", lines)
    ours.train(recipe, tmp_path / "first")  # libraries have allocated what they keep
    before = ours.live_bytes(device)
    ours.train(recipe, tmp_path / "second")
    assert ours.live_bytes(device) - before < 2**20
