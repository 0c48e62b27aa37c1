"""Train real runs: equal runs, resumed runs, refused runs and failing runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.core.errors import UserError
from harness.records import files, run_dir
from harness.records.run_dir import Status
from rltrain import checkpoint, trainer, worker_group
from rltrain.engines.base import Engine, SyncError
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.sync.memory import MemorySync
from tests.integration.training import MakeRecipe, MakeRun, adapter, assert_equal, rows, train_run


def test_two_equal_runs_agree_to_the_bit(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe()
    runs = [new_run(recipe, name) for name in ("one", "two")]
    for run in runs:
        train_run(recipe, run)
    assert_equal(*runs)
    logged = rows(runs[0])
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in logged if "eval/accuracy" in row] == [0, 2, 4]
    record = runs[0].read_manifest()
    assert record["status"] == "COMPLETE"
    assert record["result"]["metrics"]["eval/accuracy"] == logged[-1]["eval/accuracy"]
    assert record["result"]["base"] == {"eval/accuracy": logged[0]["eval/accuracy"]}


def test_another_seed_gives_another_run(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    first, other = (small_recipe(f"seed={seed}", "trainer.max_steps=1") for seed in (0, 1))
    runs = [new_run(recipe, f"seed{recipe.seed}") for recipe in (first, other)]
    for recipe, run in zip((first, other), runs, strict=True):
        train_run(recipe, run)
    assert all(rows(runs[0])[1][name] != rows(runs[1])[1][name] for name in ("entropy", "loss"))


@pytest.mark.parametrize(
    "reports", [2, 4], ids=["before its first checkpoint", "past its first checkpoint"]
)
def test_resumed_run_equals_uninterrupted_run(
    small_recipe: MakeRecipe, new_run: MakeRun, reports: int
) -> None:
    recipe = small_recipe("trainer.policy.optimizer_config.scheduler=cosine")
    uninterrupted, resumed = new_run(recipe, "uninterrupted"), new_run(recipe, "resumed")
    train_run(recipe, uninterrupted)
    train_run(recipe, resumed, stop_after=reports)
    assert resumed.status is Status.RUNNING
    train_run(recipe, resumed)
    assert_equal(uninterrupted, resumed)
    statuses = [entry["status"] for entry in resumed.read_manifest()["status_history"]]
    assert statuses == ["CREATED", "RUNNING", "RUNNING", "COMPLETE"]


def test_a_run_starts_from_another_runs_checkpoint(
    small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    uninterrupted, first, second = (
        new_run(small_recipe(), name) for name in ("uninterrupted", "first", "second")
    )
    train_run(small_recipe(), uninterrupted)
    train_run(small_recipe("trainer.max_steps=2"), first)
    source = f"trainer.resume_mode={first.path}/checkpoints/step_000002"
    train_run(small_recipe(source), second)
    assert rows(second) == rows(uninterrupted)[3:]
    assert all(
        torch.equal(tensor, adapter(uninterrupted)[name])
        for name, tensor in adapter(second).items()
    )
    done = small_recipe(source, "trainer.max_steps=2")
    with pytest.raises(UserError, match="last step already"):
        train_run(done, new_run(done, "done"))
    other = small_recipe(source, "trainer.policy.model.lora.rank=4")
    with pytest.raises(UserError, match="does not fit this recipe's policy"):
        train_run(other, new_run(other, "other"))
    nowhere = small_recipe("trainer.resume_mode=nowhere")
    with pytest.raises(UserError, match="no whole checkpoint"):
        train_run(nowhere, new_run(nowhere, "nowhere"))


@pytest.mark.parametrize("moment", ["before a checkpoint is complete", "before the last status"])
def test_a_kill_between_two_records_loses_nothing(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    recipe = small_recipe("trainer.eval_interval=4")
    uninterrupted, resumed = new_run(recipe, "uninterrupted"), new_run(recipe, "resumed")
    train_run(recipe, uninterrupted)

    def killed(*arguments: object) -> None:
        # Not recorded as a failure, like a signal.
        if any(isinstance(value, Member) and value.step == 4 for value in arguments):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment.startswith("before a checkpoint"):
            patch.setattr(checkpoint, "save", killed)
        else:
            patch.setattr(trainer.Trainer, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train_run(recipe, resumed)
    assert resumed.status is Status.RUNNING
    train_run(recipe, resumed)
    assert_equal(uninterrupted, resumed)
    results = [
        {k: v for k, v in run.read_manifest()["result"].items() if k != "seconds"}
        for run in (uninterrupted, resumed)
    ]
    assert results[0] == results[1]


def test_kl_to_the_base_starts_at_zero_and_grows(
    small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = small_recipe("trainer.algorithm.use_kl_loss=true", "trainer.policy_mini_batch_size=4")
    run = new_run(recipe, "kl")
    train_run(recipe, run)
    kl = [row["kl"] for row in rows(run) if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert kl[-1] > kl[0]


def test_dropout_affects_neither_old_logprobs_nor_the_sync_check(
    small_recipe: MakeRecipe, new_run: MakeRun
) -> None:
    recipe = small_recipe(
        "trainer.policy.model.lora.dropout=0.3",
        "trainer.policy_mini_batch_size=4",
        "trainer.max_steps=3",
        "trainer.policy.optimizer_config.lr=1e-2",
    )
    run, again = new_run(recipe, "dropout"), new_run(recipe, "again")
    for global_seed, each in enumerate((run, again)):
        torch.manual_seed(global_seed)
        train_run(recipe, each)
    assert_equal(run, again)
    logged = rows(run)[1:]
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-3 for row in logged)
    # The update has dropout and the old log-probabilities have none: some ratios leave the clip
    # range at once.
    assert any(row["clip_ratio/region_mean"] > 0 for row in logged)


def test_bfloat16_base_trains_float32_adapters(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe("trainer.policy.model.dtype=bfloat16", "trainer.max_steps=1")
    run = new_run(recipe, "bfloat16")
    train_run(recipe, run)
    assert all(tensor.dtype == torch.float32 for tensor in adapter(run).values())
    assert 1e-6 < rows(run)[-1]["sampling/sampling_logp_difference/mean"] < 5e-2


def test_a_sync_that_does_not_arrive_fails_the_run(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe("generator.backend=vllm", "trainer.policy.optimizer_config.lr=1e-2")
    run = new_run(recipe, "run")
    publish = MemorySync.publish

    def first_only(self: MemorySync, engine: Engine, model: Any, name: str, version: int) -> None:
        if version == 1:
            publish(self, engine, model, name, version)

    monkeypatch.setattr(MemorySync, "publish", first_only)
    with pytest.raises(SyncError):
        list(worker_group.train_run(recipe, run))
    assert run.status is Status.FAILED
    assert "SyncError" in run.read_manifest()["reason"]


def test_long_prompts_are_dropped_and_counted(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    lengths = small_recipe("generator.max_input_length=128")
    pack = Pack.open(lengths)
    member = pack.add(lengths, new_run(lengths, "all"))
    sizes, held_out = (
        sorted(len(problem.prompt_ids) for problem in problems)
        for problems in (member.problems, member.held_out)
    )
    pack.close()
    limit = sizes[len(sizes) // 2]
    recipe = small_recipe(f"generator.max_input_length={limit}", "trainer.max_steps=1")
    run = new_run(recipe, "some")
    train_run(recipe, run)
    last = rows(run)[-1]
    assert last["num_dropped_prompts"] == sum(size > limit for size in sizes) > 0
    # The score covers fewer problems than the file holds, and says so.
    assert last["eval/num_problems"] == sum(size <= limit for size in held_out) < len(held_out)
    assert (
        run.read_manifest()["result"]["metrics"]["eval/num_problems"] == last["eval/num_problems"]
    )


def test_the_manifest_is_not_written_at_each_step(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[Path] = []

    def write(path: Path, value: Any) -> None:
        writes.append(path)
        files.write_json(path, value)

    monkeypatch.setattr(run_dir, "write_json", write)
    counts = []
    for steps in (1, 4):
        recipe = small_recipe(
            f"trainer.max_steps={steps}", "trainer.eval_interval=0", "trainer.ckpt_interval=0"
        )
        run = new_run(recipe, f"run{steps}")
        writes.clear()
        train_run(recipe, run)
        counts.append(writes.count(run.manifest))
    assert counts[0] == counts[1] > 0
