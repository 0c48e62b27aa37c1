"""Count the engine calls, mini-batches and micro-batches of real training steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rltrain.algorithms.critic import Critic
from rltrain.algorithms.policy import Policy
from rltrain.algorithms.trained_model import Row, TrainedModel
from rltrain.data.batch import Batch
from rltrain.distributed.process_group import Ranks
from rltrain.engines.base import Request, Sample
from rltrain.engines.cpu.decoder import LlamaDecoder
from rltrain.evaluate import evaluate
from rltrain.member import Member
from rltrain.models import sequence_packing as packing
from rltrain.pack import Pack
from rltrain.rollout import sample_rollouts
from rltrain.step import train_step
from tests.integration.training import Open

PPO = "trainer.algorithm.advantage_estimator=gae"


def _step(pack: Pack, member: Member) -> Row:
    return train_step(pack, pack.members)[member]


@pytest.mark.parametrize(
    ("overrides", "updates"),
    [
        (["trainer.policy_mini_batch_size=4"], ["policy"]),
        (["trainer.policy_mini_batch_size=1"], ["policy"] * 4),
        (["trainer.update_epochs_per_batch=3"], ["policy"] * 6),
        (["trainer.train_batch_size=8"], ["policy"] * 4),
        ([PPO], ["critic"] * 2 + ["policy"] * 2),
        ([PPO, "trainer.critic_mini_batch_size=1"], ["critic"] * 4 + ["policy"] * 2),
        (
            [PPO, "trainer.critic_mini_batch_size=4", "trainer.update_epochs_per_batch=2"],
            ["critic"] * 2 + ["policy"] * 4,
        ),
    ],
)
def test_number_of_updates_for_each_batch(
    opened: Open, monkeypatch: pytest.MonkeyPatch, overrides: list[str], updates: list[str]
) -> None:
    pack, member = opened(*overrides)
    updated: list[str] = []
    optimize = TrainedModel.optimize

    def recording(self: TrainedModel, ranks: Ranks) -> Row:
        updated.append(self.name)
        return optimize(self, ranks)

    monkeypatch.setattr(TrainedModel, "optimize", recording)
    _step(pack, member)
    assert updated == updates


class RecordedBatches:
    """Batches passed to methods of trained models, `{method: [batch, ...]}`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: dict[str, list[Batch]] = {}
        for owner, name in (
            (Policy, "logprobs"),
            (Policy, "loss"),
            (Critic, "values"),
            (Critic, "loss"),
        ):
            self._watch(monkeypatch, owner, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, owner: type[TrainedModel], name: str) -> None:
        method, recorded = getattr(owner, name), self.batches.setdefault(f"{owner.name}.{name}", [])

        def recording(model: TrainedModel, batch: Batch, *rest: Any) -> Any:
            recorded.append(batch)
            return method(model, batch, *rest)

        monkeypatch.setattr(owner, name, recording)

    def sizes(self, name: str) -> list[int]:
        """Return the number of sequences in each of a method's batches."""
        return [len(batch) for batch in self.batches[name]]


@pytest.fixture(scope="module")
def first_row() -> dict[str, Row]:
    """Return a cache for the metrics of the first step, computed in as few parts as possible."""
    return {}


@pytest.mark.parametrize(
    "setting",
    [
        "micro_train_batch_size_per_gpu=16",
        "micro_train_batch_size_per_gpu=3",
        "micro_forward_batch_size_per_gpu=5",
        "max_tokens_per_microbatch=200",
    ],
)
def test_micro_batches_have_their_size_and_change_no_result(
    opened: Open, monkeypatch: pytest.MonkeyPatch, first_row: dict[str, Row], setting: str
) -> None:
    pack, member = opened(PPO, "trainer.micro_train_batch_size_per_gpu=16", f"trainer.{setting}")
    recorded = RecordedBatches(monkeypatch)
    row = _step(pack, member)
    # 16 sequences to compute, and 8 in each of two mini-batches.
    forward, train = [16], [8, 8]
    if setting == "micro_train_batch_size_per_gpu=3":
        train = [3, 3, 2] * 2
    if setting == "micro_forward_batch_size_per_gpu=5":
        forward = [5, 5, 5, 1]
    if setting.startswith("max_tokens"):
        assert sum(recorded.sizes("policy.logprobs")) == 16
        for name, batches in recorded.batches.items():
            # `loss` calls `values` too.
            assert len(batches) > (2 if name.endswith("loss") else 1)
            assert (
                max(packing.pack(batch, share=True).input_ids.numel() for batch in batches) <= 200
            )
    else:
        assert recorded.sizes("policy.logprobs") == forward
        assert recorded.sizes("policy.loss") == recorded.sizes("critic.loss") == train
        assert recorded.sizes("critic.values") == forward + train
    expected = first_row.setdefault("first", row)
    for name in (
        "loss",
        "grad_norm",
        "entropy",
        "critic/vf_loss",
        "critic/grad_norm",
        "critic/mean_value",
    ):
        assert row[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-6), name


def _watch_engine(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> list[list[Request]]:
    """Return a list to which each later call of the engine adds its requests."""
    calls: list[list[Request]] = []
    generate = pack.engine.generate

    def recording(requests: list[Request]) -> list[list[Sample]]:
        calls.append(list(requests))
        return generate(requests)

    monkeypatch.setattr(pack.engine, "generate", recording)
    return calls


@pytest.mark.parametrize(("batch", "samples"), [(4, 4), (6, 3)])
def test_number_of_prompts_and_samples_for_each_step(
    opened: Open, monkeypatch: pytest.MonkeyPatch, batch: int, samples: int
) -> None:
    pack, _ = opened(
        f"trainer.train_batch_size={batch}", f"generator.n_samples_per_prompt={samples}"
    )
    calls = _watch_engine(pack, monkeypatch)
    ((scored, _),) = sample_rollouts(pack, pack.members).values()
    assert scored.rewards.shape == (batch, samples)
    assert [[one.n for one in requests] for requests in calls] == [[samples] * batch]


def test_batched_is_one_engine_call_or_one_for_each_prompt(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []
    for batched in ("true", "false"):
        pack, _ = opened(f"generator.batched={batched}")
        calls = _watch_engine(pack, monkeypatch)
        ((scored, _),) = sample_rollouts(pack, pack.members).values()
        assert [len(requests) for requests in calls] == ([4] if batched == "true" else [1] * 4)
        tokens.append([[sample.token_ids for sample in group] for group in scored.samples])
    assert tokens[0] == tokens[1]


def test_evaluation_calls_the_engine_in_batches(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for size, samples, expected in (
        ("null", 2, [12]),
        (1024, 2, [12]),
        (10, 2, [5, 5, 2]),
        (7, 1, [7, 5]),
    ):
        pack, member = opened(
            f"trainer.eval_batch_size={size}", f"generator.eval_n_samples_per_prompt={samples}"
        )
        calls = _watch_engine(pack, monkeypatch)
        row, scored = evaluate(pack, [member])[member]
        assert [len(requests) for requests in calls] == expected
        assert scored.rewards.shape == (12, samples)
        rows.append(row)
    assert rows[0]["eval/accuracy"] == rows[1]["eval/accuracy"] == rows[2]["eval/accuracy"]
    assert rows[0]["eval/mean@2"] == rows[0]["eval/accuracy"] <= rows[0]["eval/pass@2"]
    assert not any("@" in name for name in rows[3])


def _watch_widths(patch: pytest.MonkeyPatch, widths: list[int]) -> None:
    """Record how many sequences each batch of the engine decodes."""
    prefill = LlamaDecoder.prefill

    def recording_prefill(
        self: LlamaDecoder, prompts: Sequence[Sequence[int]], prompt_of_N: torch.Tensor
    ) -> torch.Tensor:
        widths.append(len(prompt_of_N))
        return prefill(self, prompts, prompt_of_N)

    patch.setattr(LlamaDecoder, "prefill", recording_prefill)


def test_number_of_sequences_decoded_at_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    for limit, most in ((256, 16), (5, 5)):
        pack, _ = opened(f"generator.max_num_seqs={limit}")
        widths: list[int] = []
        with monkeypatch.context() as patch:
            _watch_widths(patch, widths)
            ((scored, _),) = sample_rollouts(pack, pack.members).values()
        assert max(widths) == most
        tokens.append([[sample.token_ids for sample in group] for group in scored.samples])
    assert tokens[0] == tokens[1]
