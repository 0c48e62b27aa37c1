"""Test out-of-memory errors: the step is repeated with smaller micro-batches."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from harness.config.metrics import without_timings
from harness.config.schema import Recipe
from harness.records.metrics_file import MetricsFile
from rltrain.algorithms.policy import Policy
from rltrain.data.batch import Batch
from rltrain.engines.transformers import TransformersEngine
from rltrain.micro_batch_size import PassTooLarge
from rltrain.models import logprobs as logprobs_module
from rltrain.pack import Pack
from rltrain.report import StepReport
from rltrain.trainer import Trainer
from tests.integration.training import MakeRecipe, MakeRun, train_run

BUDGET, FITS = 400, 110
KEY = "trainer.max_tokens_per_microbatch"
LORA = "trainer.policy.model.lora"
# A mini-batch holds all samples of a step, unless old log-probabilities are needed.
MEMBERS = [
    [f"{LORA}.rank=8", "seed=1"],
    [f"{LORA}.rank=1", "seed=2", "trainer.target_modules=attention"],
    [f"{LORA}.rank=4", "seed=3", "trainer.target_modules=mlp"],
    [f"{LORA}.rank=2", "seed=4"],
]
STAGES: dict[str, list[str]] = {
    "old log-probabilities": ["trainer.policy_mini_batch_size=2"],
    "forward": [],
    "backward": [],
    "evaluation": ["trainer.max_steps=1", "generator.eval_sampling_params.temperature=0.5"],
}


def _fail(model: Any, batch: Batch, victims: set[str]) -> None:
    if model.active_adapter in victims and batch.packed_tokens > FITS:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _inject(stage: str, victims: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make large micro-batches of these members run out of memory in a stage of the step."""
    loss, logprobs, token_logprobs = Policy.loss, Policy.logprobs, logprobs_module.token_logprobs

    def failing_loss(self: Policy, micro: Batch, totals: Any) -> Any:
        if stage == "forward":
            _fail(self.model, micro, victims)
        value, stats = loss(self, micro, totals)
        if stage == "backward" and value.requires_grad:
            value.register_hook(lambda _: _fail(self.model, micro, victims))
        return value, stats

    def failing_logprobs(self: Policy, batch: Batch) -> torch.Tensor:
        _fail(self.model, batch, victims)
        return logprobs(self, batch)

    def failing_head(model: Any, batch: Batch, temperature: float) -> torch.Tensor:
        if temperature == 0.5:
            _fail(model, batch, victims)
        return token_logprobs(model, batch, temperature)

    monkeypatch.setattr(Policy, "loss", failing_loss)
    if stage == "old log-probabilities":
        monkeypatch.setattr(Policy, "logprobs", failing_logprobs)
    if stage == "evaluation":
        monkeypatch.setattr("rltrain.algorithms.policy.token_logprobs", failing_head)


class Runs:
    """Trains packs of runs for two steps and returns their metrics and adapters."""

    def __init__(self, make: MakeRecipe, new_run: MakeRun) -> None:
        self._make, self._new_run, self._count = make, new_run, 0

    def recipes(self, count: int, budgets: list[int], overrides: list[str]) -> list[Recipe]:
        """Return the first members' recipes."""
        shared = [
            "trainer.policy_mini_batch_size=4",
            "trainer.micro_train_batch_size_per_gpu=null",
            "trainer.max_steps=2",
            *overrides,
        ]
        settings = zip(MEMBERS[:count], budgets, strict=True)
        return [self._make(*shared, *keys, f"{KEY}={budget}") for keys, budget in settings]

    def train(
        self, recipes: list[Recipe], before: Callable[[Pack], object] = lambda pack: None
    ) -> list[Any]:
        """Return rows, adapter and manifest of each run.

        `before` is called with the pack when all members have joined.
        """
        self._count += 1
        trainer = Trainer(recipes[0], slots=len(recipes))
        pack = trainer.pack
        runs = [self._new_run(one, f"{self._count}-{i}") for i, one in enumerate(recipes)]
        for recipe, run in zip(recipes, runs, strict=True):
            trainer.add(recipe, run)
        before(pack)
        for _ in range(recipes[0].trainer.max_steps or 0):
            for outcome in trainer.step(runs).values():
                if isinstance(outcome, Exception):
                    raise outcome
        weights = [
            {n: p.detach().clone() for n, p in m.policy.parameters.items()} for m in pack.members
        ]
        pack.close()
        rows = [[without_timings(row) for row in MetricsFile(run.metrics).rows()] for run in runs]
        manifests = [run.read_manifest() for run in runs]
        return [rows, [list(weights_of_run.values()) for weights_of_run in weights], manifests]


@pytest.fixture
def runs(small_recipe: MakeRecipe, new_run: MakeRun) -> Iterator[Runs]:
    with torch.random.fork_rng():
        yield Runs(small_recipe, new_run)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_the_result_equals_that_of_smaller_micro_batches(
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    stage: str,
    count: int,
) -> None:
    victim = min(1, count - 1)
    recipes = runs.recipes(count, [BUDGET] * count, STAGES[stage])
    with monkeypatch.context() as patched:
        rows, weights, manifests = runs.train(
            recipes, lambda pack: _inject(stage, {pack.members[victim].name}, patched)
        )
    failures = manifests[victim]["out_of_memory"]
    budget = failures[-1]["tokens"]
    assert budget <= FITS
    assert 1 <= len(failures) <= 4
    assert all(entry["step"] >= 1 for entry in failures)
    assert capfd.readouterr().err.count("out of memory at step") == len(failures)
    assert all("out_of_memory" not in record for i, record in enumerate(manifests) if i != victim)

    # After the last step's evaluation no training is left.
    then = BUDGET if stage == "evaluation" else budget
    budgets = [then if i == victim else BUDGET for i in range(count)]
    expected_rows, expected_weights, _ = runs.train(runs.recipes(count, budgets, STAGES[stage]))
    assert rows == expected_rows
    for tensors, expected in zip(weights, expected_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_a_resumed_run_keeps_the_smaller_micro_batches(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(f"{KEY}={BUDGET}", "trainer.max_steps=4")
    run = new_run(recipe, "stopped")
    pack = Pack.open(recipe)
    member = pack.add(recipe, run)
    member.limit_tokens(90)
    pack.remove(member)
    assert pack.add(recipe, run).max_tokens == 90
    pack.close()


def test_a_failure_with_one_sequence_fails_the_member_and_keeps_no_tensor(
    runs: Runs, small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    loss = Policy.loss

    def failing(self: Policy, micro: Batch, totals: Any) -> Any:
        if self.adapter == "member1":
            activations = torch.ones(1000)
            kept.append(weakref.ref(activations))
            raise torch.OutOfMemoryError(f"CUDA out of memory. {len(activations)}")
        return loss(self, micro, totals)

    recipes = runs.recipes(2, [BUDGET] * 2, ["trainer.max_steps=1"])
    trainer = Trainer(recipes[0], slots=2)
    run_dirs = [new_run(recipe, f"own{i}") for i, recipe in enumerate(recipes)]
    for recipe, run in zip(recipes, run_dirs, strict=True):
        trainer.add(recipe, run)
    monkeypatch.setattr(Policy, "loss", failing)
    done, error = trainer.step(run_dirs).values()
    assert isinstance(done, StepReport)
    assert done.done
    assert isinstance(error, PassTooLarge)
    assert re.search(r"1 sequences, \d+ tokens: CUDA out of memory", str(error))
    gc.collect()
    assert len(kept) > 1
    assert all(ref() is None for ref in kept)
    assert error.sequences == 1
    trainer.close()


@pytest.mark.parametrize("count", [1, 2])
def test_a_lost_gpu_ends_the_process(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    def lost(self: Policy, micro: Batch, totals: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    recipes = runs.recipes(count, [BUDGET] * count, [])
    with pytest.raises(torch.AcceleratorError):
        runs.train(recipes, lambda pack: monkeypatch.setattr(Policy, "loss", lost))


def test_sampling_continues_with_fewer_sequences_at_a_time(
    small_recipe: MakeRecipe, new_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = TransformersEngine._batch

    def failing(self: TransformersEngine, requests: Any, positions: Any, decoder: Any) -> Any:
        if len(positions) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch(self, requests, positions, decoder)

    logs = []
    for most, patch in ((512, True), (4, False)):
        with monkeypatch.context() as patched:
            if patch:
                patched.setattr(TransformersEngine, "_batch", failing)
            recipe = small_recipe(f"generator.max_num_seqs={most}", "trainer.max_steps=2")
            run = new_run(recipe, f"most{most}")
            train_run(recipe, run)
            logs.append([without_timings(row) for row in MetricsFile(run.metrics).rows()])
    assert [row["eval/accuracy"] for row in logs[0] if "eval/accuracy" in row] == [
        row["eval/accuracy"] for row in logs[1] if "eval/accuracy" in row
    ]
    for actual_row, expected_row in zip(*logs, strict=True):
        assert actual_row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)
