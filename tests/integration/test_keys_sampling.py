"""Test sampling settings of training and evaluation by what the engine samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytest

from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from rltrain.algorithms.trained_model import Row
from rltrain.engines.base import Request, Sample
from rltrain.evaluate import evaluate
from rltrain.member import Member
from rltrain.pack import Pack
from rltrain.rollout import Rollout, sample_rollouts
from rltrain.step import train_step

MakeRecipe = Callable[..., Recipe]
MakeRun = Callable[[Recipe, str], RunDir]
Tokens = list[list[list[int]]]
GREEDY = ("temperature=1e-6", "top_k=1", "top_p=1e-6")


class Sampler:
    """Samples from one pack under changing recipes.

    The recipes agree in the keys that all members of a pack share.
    """

    def __init__(self, make: MakeRecipe, new_run: MakeRun) -> None:
        self._make, self._new_run, self._count = make, new_run, 0
        self.pack = Pack.open(make())

    def train(self, *overrides: str) -> Rollout:
        """Return the rollout that a step would train on."""
        with self._member(*overrides):
            ((scored, _),) = sample_rollouts(self.pack, self.pack.members).values()
        return scored

    def evaluate(self, *overrides: str) -> tuple[Row, Rollout]:
        """Return metrics and two samples of each held-out problem."""
        with self._member("generator.eval_n_samples_per_prompt=2", *overrides) as member:
            return evaluate(self.pack, [member])[member]

    def step(self, *overrides: str) -> Row:
        """Return a training step's metrics."""
        with self._member(*overrides) as member:
            return train_step(self.pack, self.pack.members)[member]

    @contextlib.contextmanager
    def _member(self, *overrides: str) -> Iterator[Member]:
        recipe = self._make(*overrides)
        self._count += 1
        member = self.pack.add(recipe, self._new_run(recipe, f"run{self._count}"))
        self.pack.publish_member(member)
        try:
            yield member
        finally:
            self.pack.remove(member)


@pytest.fixture
def sampler(small_recipe: MakeRecipe, new_run: MakeRun) -> Iterator[Sampler]:
    one = Sampler(small_recipe, new_run)
    yield one
    one.pack.close()


def _tokens(scored: Rollout) -> Tokens:
    return [[sample.token_ids for sample in group] for group in scored.samples]


def _longest(scored: Rollout) -> int:
    return max(len(sample.token_ids) for sample in scored.flat_samples)


def _all_samples_equal(scored: Rollout) -> bool:
    """Return whether all samples of each prompt are the same."""
    return all(sample == group[0] for group in _tokens(scored) for sample in group)


def test_training_and_evaluation_have_separate_length_limits(sampler: Sampler) -> None:
    limits = (
        "generator.sampling_params.max_generate_length=5",
        "generator.eval_sampling_params.max_generate_length=7",
    )
    scored = sampler.train(*limits)
    assert _longest(scored) == 5
    assert {
        len(sample.token_ids) for sample in scored.flat_samples if sample.finish_reason == "length"
    } == {5}
    row, scored = sampler.evaluate(*limits)
    assert _longest(scored) == 7
    assert row["eval/clipped_ratio"] == scored.truncated.float().mean() > 0
    # The limit cuts a sample and changes nothing before the cut.
    longer = sampler.train("generator.sampling_params.max_generate_length=8")
    shorter = sampler.train(*limits)
    assert [[s[:5] for s in group] for group in _tokens(longer)] == _tokens(shorter)


@pytest.mark.parametrize("setting", GREEDY)
def test_training_and_evaluation_have_separate_sampling_distributions(
    sampler: Sampler, setting: str
) -> None:
    plain, (_, plain_eval) = sampler.train(), sampler.evaluate()
    assert not _all_samples_equal(plain)
    assert not _all_samples_equal(plain_eval)
    # With only the likeliest token left, all samples of a prompt are equal.
    narrowed = sampler.train(f"generator.sampling_params.{setting}")
    assert _all_samples_equal(narrowed)
    assert _tokens(sampler.evaluate(f"generator.sampling_params.{setting}")[1]) == _tokens(
        plain_eval
    )
    _, evaluated = sampler.evaluate(f"generator.eval_sampling_params.{setting}")
    assert _all_samples_equal(evaluated)
    assert _tokens(sampler.train(f"generator.eval_sampling_params.{setting}")) == _tokens(plain)


def test_evaluation_at_temperature_0_is_greedy(sampler: Sampler) -> None:
    greedy = [
        _tokens(sampler.evaluate(f"generator.eval_sampling_params.{s}")[1])
        for s in ("temperature=0", "top_k=1")
    ]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_the_trainer_uses_the_sampling_temperature(sampler: Sampler, temperature: float) -> None:
    row = sampler.step(f"generator.sampling_params.temperature={temperature}")
    plain = sampler.step()
    assert row["sampling/sampling_logp_difference/mean"] < 1e-4
    assert (row["entropy"] < plain["entropy"]) is (temperature < 1)


def test_every_prompt_and_batch_has_another_seed(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    generate = sampler.pack.engine.generate

    def record(requests: Sequence[Request]) -> list[list[Sample]]:
        seeds.extend(request.seed for request in requests)
        return generate(requests)

    monkeypatch.setattr(sampler.pack.engine, "generate", record)
    # It samples batches until four groups have a signal.
    sampler.train("trainer.algorithm.dynamic_sampling.type=filter")
    assert len(seeds) > 4
    assert len(set(seeds)) == len(seeds)
