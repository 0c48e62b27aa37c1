"""Training for real: equal runs, resumed runs, packs, full fine-tuning, failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.errors import UserError
from harness.metrics import MetricsFile, without_timings
from harness.rundir import RunDir, Status
from harness.schema import Recipe
from rltrain import checkpoint, trainer
from rltrain.engines.base import Engine
from rltrain.member import Member
from rltrain.model import adapter_layers
from rltrain.pack import Pack
from rltrain.ranks import Ranks
from rltrain.step import train_step
from rltrain.sync.disk import DiskSync
from rltrain.sync.proof import SyncError
from rltrain.trainer import train

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[[Recipe, str], RunDir]


def _train(recipe: Recipe, run: RunDir, *, stop_after: int | None = None) -> None:
    pack = Pack.open(recipe)
    reports = train(pack, pack.join(recipe, run))
    for _ in islice(reports, stop_after):
        pass
    reports.close()
    pack.close()


def _rows(run: RunDir) -> list[dict[str, float]]:
    return [without_timings(row) for row in MetricsFile(run.metrics).rows()]


def _adapter(run: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "final" / "adapter_model.safetensors")


def _assert_equal(one: RunDir, two: RunDir) -> None:
    assert _rows(one) == _rows(two)
    first, second = _adapter(one), _adapter(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_equal_runs_agree_to_the_bit(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe()
    runs = [new_run(recipe, name) for name in ("one", "two")]
    for run in runs:
        _train(recipe, run)
    _assert_equal(*runs)
    rows = _rows(runs[0])
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4]
    record = runs[0].read_manifest()
    assert record["status"] == "COMPLETE"
    assert record["result"]["metrics"]["eval/accuracy"] == rows[-1]["eval/accuracy"]
    assert record["result"]["base"] == {"eval/accuracy": rows[0]["eval/accuracy"]}


def test_another_seed_is_another_run(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    for seed in (0, 1):
        recipe = small_recipe(f"seed={seed}", "trainer.max_steps=1")
        _train(recipe, new_run(recipe, f"seed{seed}"))
        seen = _rows(RunDir(new_run(recipe, f"again{seed}").path.parent / f"seed{seed}"))
        if seed == 0:
            first = seen
    assert first[1]["reward"] != seen[1]["reward"] or first[1]["entropy"] != seen[1]["entropy"]


@pytest.mark.parametrize("reports", [2, 4], ids=["before its first checkpoint", "past its first checkpoint"])
def test_a_stopped_run_goes_on_as_if_never_stopped(small_recipe: MakeRecipe, new_run: MakeRun, reports: int) -> None:
    recipe = small_recipe("trainer.policy.optimizer_config.scheduler=cosine")
    whole, broken = new_run(recipe, "whole"), new_run(recipe, "broken")
    _train(recipe, whole)
    _train(recipe, broken, stop_after=reports)
    assert broken.status is Status.RUNNING
    _train(recipe, broken)
    _assert_equal(whole, broken)
    statuses = [entry["status"] for entry in broken.read_manifest()["status_history"]]
    assert statuses == ["CREATED", "RUNNING", "RUNNING", "COMPLETE"]


def test_another_runs_checkpoint_is_gone_on_with(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    whole, first, second = (new_run(small_recipe(), name) for name in ("whole", "first", "second"))
    _train(small_recipe(), whole)
    _train(small_recipe("trainer.max_steps=2"), first)
    source = f"trainer.resume_mode={first.path}/checkpoints/step_000002"
    _train(small_recipe(source), second)
    assert _rows(second) == _rows(whole)[3:]
    assert all(torch.equal(tensor, _adapter(whole)[name]) for name, tensor in _adapter(second).items())
    done = small_recipe(source, "trainer.max_steps=2")
    with pytest.raises(UserError, match="last step already"):
        _train(done, new_run(done, "done"))
    other = small_recipe(source, "trainer.policy.model.lora.rank=4")
    with pytest.raises(UserError, match="does not fit this recipe's policy"):
        _train(other, new_run(other, "other"))
    nowhere = small_recipe("trainer.resume_mode=nowhere")
    with pytest.raises(UserError, match="no whole checkpoint"):
        _train(nowhere, new_run(nowhere, "nowhere"))


@pytest.mark.parametrize("moment", ["before a checkpoint is whole", "before the last status"])
def test_a_kill_between_two_records_loses_nothing(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    recipe = small_recipe("trainer.eval_interval=4")
    whole, broken = new_run(recipe, "whole"), new_run(recipe, "broken")
    _train(recipe, whole)

    def killed(member: Member, *_: object) -> None:
        # Like a signal: nothing below records it as a failure.
        if member.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((checkpoint, "save") if moment.endswith("whole") else (trainer, "finish")), killed)
        with pytest.raises(KeyboardInterrupt):
            _train(recipe, broken)
    assert broken.status is Status.RUNNING
    _train(recipe, broken)
    _assert_equal(whole, broken)
    results = [{k: v for k, v in run.read_manifest()["result"].items() if k != "seconds"} for run in (whole, broken)]
    assert results[0] == results[1]


def test_a_member_of_a_pack_trains_as_if_alone(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    wanted = [
        ("trainer.policy.model.lora.rank=4", "trainer.target_modules=attention", "seed=3"),
        (
            "trainer.policy.model.lora.rank=8",
            "trainer.policy.optimizer_config.lr=3e-3",
            "generator.n_samples_per_prompt=2",
        ),
    ]
    room = "generator.max_lora_rank=8"
    recipes = [small_recipe(room, *overrides) for overrides in wanted]
    pack = Pack.open(recipes[0])
    assert all(pack.can_hold(recipe) for recipe in recipes)
    members = [pack.join(recipe, new_run(recipe, f"m{i}")) for i, recipe in enumerate(recipes)]
    pack.publish(pack.members)
    rows = _two_steps(pack)
    together = [rows[member] for member in members]
    _leave_all(pack, members)
    for recipe, expected in zip(recipes, together, strict=True):
        member = pack.join(recipe, new_run(recipe, f"solo{recipe.seed}"))
        pack.publish(pack.members)
        alone = _two_steps(pack)[member]
        _leave_all(pack, [member])
        assert without_timings(alone) == without_timings(expected)
    pack.close()


def _two_steps(pack: Pack) -> dict[Member, dict[str, float]]:
    for _ in range(2):
        rows = train_step(pack, pack.members)
        for member in pack.members:
            member.step += 1
    return rows


def _leave_all(pack: Pack, members: list[Member]) -> None:
    for member in members:
        pack.leave(member)


def test_a_pack_is_as_new_when_a_member_has_left(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe("trainer.max_steps=2")
    first, second = new_run(recipe, "first"), new_run(recipe, "second")
    pack = Pack.open(recipe)
    for run in (first, second):
        member = pack.join(recipe, run)
        for _ in train(pack, member):
            pass
        pack.leave(member)
        assert not (run.path / "sync").exists()
    pack.close()
    _assert_equal(first, second)


def test_kl_to_the_base_starts_at_zero_and_grows(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe("trainer.algorithm.use_kl_loss=true", "trainer.policy_mini_batch_size=4")
    run = new_run(recipe, "kl")
    _train(recipe, run)
    kl = [row["kl"] for row in _rows(run) if "kl" in row]
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert kl[-1] > kl[0]


def test_dropout_leaves_old_logprobs_and_the_sync_proof_alone(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe(
        "trainer.policy.model.lora.dropout=0.3", "trainer.policy_mini_batch_size=4", "trainer.max_steps=3",
        "trainer.policy.optimizer_config.lr=1e-2",
    )  # fmt: skip
    run, again = new_run(recipe, "dropout"), new_run(recipe, "again")
    for global_seed, each in enumerate((run, again)):
        torch.manual_seed(global_seed)
        _train(recipe, each)
    _assert_equal(run, again)
    rows = _rows(run)[1:]
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-3 for row in rows)
    # The update sees dropout, the old log-probabilities do not: some ratios leave the clip range at once.
    assert any(row["clip_ratio/region_mean"] > 0 for row in rows)


def test_bfloat16_base_trains_float32_adapters(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe("trainer.policy.model.dtype=bfloat16", "trainer.max_steps=1")
    run = new_run(recipe, "bfloat16")
    _train(recipe, run)
    assert all(tensor.dtype == torch.float32 for tensor in _adapter(run).values())
    assert 1e-6 < _rows(run)[-1]["sampling/sampling_logp_difference/mean"] < 5e-2


def test_full_fine_tuning_trains_every_weight(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe(
        "trainer.policy.model.lora.rank=0", "trainer.policy.model.lora.sync=merge", "trainer.max_steps=2",
        "trainer.algorithm.use_kl_loss=true", "trainer.policy.optimizer_config.lr=1e-4",
    )  # fmt: skip
    run = new_run(recipe, "full")
    pack = Pack.open(recipe)
    before = {name: p.clone() for name, p in pack.model.named_parameters()}
    member = pack.join(recipe, run)
    for _ in train(pack, member):
        pass
    assert all(not torch.equal(p, before[name]) for name, p in pack.model.named_parameters())
    assert not pack.can_hold(recipe)
    assert _rows(run)[-1]["kl"] > 0
    saved = load_file(run.adapter / "final" / "model.safetensors")
    assert torch.equal(saved["model.norm.weight"], dict(pack.model.named_parameters())["model.norm.weight"])
    pack.close()


def test_full_fine_tuning_in_bfloat16_keeps_small_updates(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    recipe = small_recipe(
        "trainer.policy.model.lora.rank=0", "trainer.policy.model.lora.sync=merge", "trainer.max_steps=1",
        "trainer.policy.model.dtype=bfloat16", "trainer.policy.optimizer_config.lr=1e-6",
    )  # fmt: skip
    run = new_run(recipe, "full")
    pack = Pack.open(recipe)
    before = {name: p.clone() for name, p in pack.model.named_parameters()}
    assert list(train(pack, pack.join(recipe, run)))
    matrices = {name: p for name, p in pack.model.named_parameters() if p.dim() == 2}
    # A bfloat16 weight of 0.02 moves by 6e-5 or not at all.
    assert all(0 < (p - before[name]).abs().max() < 1e-5 for name, p in matrices.items())
    saved = load_file(run.adapter / "final" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in saved.values())
    pack.close()


@pytest.fixture(scope="module")
def open_pack(small_data: list[str]) -> Iterator[Callable[[Recipe], Pack]]:
    opened: list[Pack] = []

    def make(recipe: Recipe) -> Pack:
        opened.append(Pack.open(recipe))
        return opened[-1]

    yield make
    for pack in opened:
        pack.close()


@pytest.mark.parametrize(
    ("targets", "exclude", "leaves"),
    [
        ("all-linear", "null", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", "null", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", "null", {"gate_proj", "up_proj", "down_proj"}),
        ("[q_proj,up_proj]", "null", {"q_proj", "up_proj"}),
        ("all-linear", "[q_proj]", {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (r"'.*\.layers\.0\..*(q|k)_proj'", "null", {"q_proj", "k_proj"}),
    ],
)
def test_target_modules_are_what_the_recipe_says(
    small_recipe: MakeRecipe, new_run: MakeRun, open_pack: Callable[[Recipe], Pack],
    targets: str, exclude: str, leaves: set[str],
) -> None:  # fmt: skip
    recipe = small_recipe(f"trainer.target_modules={targets}", f"trainer.exclude_modules={exclude}")
    pack = open_pack(recipe)
    member = pack.join(recipe, new_run(recipe, "run"))
    found = adapter_layers(pack.model, member.name)
    assert {name.rsplit(".", 1)[1] for name in found} == leaves
    layers = 1 if "layers" in targets else pack.model.config.num_hidden_layers
    assert len(found) == len(leaves) * layers
    assert len(member.policy.parameters) == 2 * len(found)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in member.policy.parameters.values())


def test_a_target_that_matches_nothing_is_refused(
    small_recipe: MakeRecipe, new_run: MakeRun, open_pack: Callable[[Recipe], Pack]
) -> None:
    recipe = small_recipe("trainer.target_modules=[q_proj,query]")
    with pytest.raises(UserError, match=r"names no module.*\n.*query"):
        open_pack(recipe).join(recipe, new_run(recipe, "run"))


def test_non_finite_gradients_are_skipped_then_fail(
    small_recipe: MakeRecipe, new_run: MakeRun, open_pack: Callable[[Recipe], Pack]
) -> None:
    recipe = small_recipe("trainer.max_bad_steps=2")
    member = open_pack(recipe).join(recipe, new_run(recipe, "run"))
    before = [p.clone() for p in member.policy.parameters.values()]

    def step_with_nan() -> dict[str, float]:
        for p in member.policy.parameters.values():
            p.grad = torch.full_like(p, math.nan)
        return member.policy.optimize(Ranks())

    assert step_with_nan()["skipped_updates"] == 1
    assert all(torch.equal(p, old) for p, old in zip(member.policy.parameters.values(), before, strict=True))
    with pytest.raises(FloatingPointError, match="2 times in a row"):
        step_with_nan()


def test_gradients_are_clipped_to_the_recipes_norm(
    small_recipe: MakeRecipe, new_run: MakeRun, open_pack: Callable[[Recipe], Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe("trainer.policy.optimizer_config.max_grad_norm=0.5")
    member = open_pack(recipe).join(recipe, new_run(recipe, "run"))
    parameters = member.policy.parameters.values()
    seen: list[float] = []

    def step() -> None:
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)))

    monkeypatch.setattr(member.policy.optimizer, "step", step)
    for p in parameters:
        p.grad = torch.ones_like(p)
    before = math.sqrt(sum(p.numel() for p in member.policy.parameters.values()))
    assert member.policy.optimize(Ranks())["grad_norm"] == pytest.approx(before, rel=1e-5)
    assert seen == [pytest.approx(0.5, rel=1e-3)]
    assert all(p.grad is None for p in member.policy.parameters.values())


@pytest.mark.heavy
def test_a_sync_that_does_not_arrive_fails_the_run(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe("generator.backend=vllm", "trainer.policy.optimizer_config.lr=1e-2")
    run = new_run(recipe, "run")
    pack = Pack.open(recipe)
    member = pack.join(recipe, run)
    publish = DiskSync.publish

    def first_only(self: DiskSync, engine: Engine, model: Any, name: str, version: int) -> None:
        if version == 1:
            publish(self, engine, model, name, version)

    monkeypatch.setattr(DiskSync, "publish", first_only)
    with pytest.raises(SyncError):
        list(train(pack, member))
    assert run.status is Status.FAILED
    assert "SyncError" in run.read_manifest()["reason"]
    pack.close()


def test_too_few_short_prompts_are_explained(
    small_recipe: MakeRecipe, new_run: MakeRun, open_pack: Callable[[Recipe], Pack]
) -> None:
    pack = open_pack(small_recipe())
    shortest = min(len(p.prompt_ids) for p in pack.join(small_recipe(), new_run(small_recipe(), "all")).problems)
    recipe = small_recipe(f"generator.max_input_length={shortest}", "trainer.train_batch_size=24")
    with pytest.raises(UserError, match="fill a batch"):
        pack.join(recipe, new_run(recipe, "some"))


@pytest.mark.heavy
def test_runs_of_one_name_sync_apart(small_recipe: MakeRecipe, tmp_path: Path) -> None:
    shared = tmp_path / "adapters"
    recipe = small_recipe("generator.backend=vllm", f"trainer.policy.model.lora.lora_sync_path={shared}")
    runs = [RunDir(tmp_path / sweep / "0000") for sweep in ("one", "two")]
    pack = Pack.open(recipe, room=2)
    for run in runs:
        run.create("", {})
        pack.publish_member(pack.join(recipe, run))
        pack.publish_member(pack.members[-1])
    folders = sorted(p.relative_to(shared).as_posix().split("/", 1)[1] for p in shared.glob("*/*/*"))
    assert folders == ["member0/v000002", "member1/v000002"]
    assert len(list(shared.iterdir())) == 2
    pack.close()
    assert list(shared.iterdir()) == []


def test_long_prompts_are_dropped_and_counted(small_recipe: MakeRecipe, new_run: MakeRun) -> None:
    lengths = small_recipe("generator.max_input_length=128")
    pack = Pack.open(lengths)
    member = pack.join(lengths, new_run(lengths, "all"))
    sizes = sorted(len(problem.prompt_ids) for problem in member.problems)
    pack.close()
    limit = sizes[len(sizes) // 2]
    recipe = small_recipe(f"generator.max_input_length={limit}", "trainer.max_steps=1")
    run = new_run(recipe, "some")
    _train(recipe, run)
    assert _rows(run)[-1]["num_dropped_prompts"] == sum(size > limit for size in sizes)
