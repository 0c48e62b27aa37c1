"""Test what every registered engine must do.

A new engine in the registry is tested without changes.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from harness.core.errors import UserError
from rltrain.engines.base import Engine, Request, SyncError
from rltrain.engines.remote import RemoteEngines
from rltrain.sync.disk import DiskSync, adapter_config, adapter_tensors, write_tensors
from tests.contracts.tiny import (
    ADAPTERS,
    KINDS,
    LONGEST,
    MAX_INPUT_LENGTH,
    STOP_TOKEN_IDS,
    VOCAB,
    adapt,
    flat_logprobs,
    load_base,
    marks_of,
    name_of,
    next_token_logits,
    prompt,
    ray_for_two,
    request,
    start,
    tokens,
    trainer_logprobs,
)

ALL_KINDS = [pytest.param(kind, id=name_of(kind), marks=marks_of(kind)) for kind in KINDS]
MEMBERS: list[str | None] = [*ADAPTERS, None]


@pytest.fixture(scope="module")
def model(base_dir: Path) -> PeftModel:
    return adapt(load_base(base_dir))


@pytest.fixture(scope="module", params=ALL_KINDS)
def engine(
    request: pytest.FixtureRequest,
    model: PeftModel,
    base_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    """Return an engine that serves both adapters in all its slots."""
    with contextlib.ExitStack() as stack:
        if request.param == "remote":
            stack.enter_context(ray_for_two())
        engine = start(request.param, model, base_dir)
        stack.callback(engine.close)
        sync = DiskSync(tmp_path_factory.mktemp("adapters"))
        for member in ADAPTERS:
            sync.publish(engine, model, member, 1)
        yield engine


def test_samples_come_in_the_order_of_the_requests(engine: Engine, model: PeftModel) -> None:
    requests = [
        request(length, member, n=n)
        for length, member, n in [
            (30, "attention", 1),
            (3, None, 3),
            (12, "all_linear", 2),
            (5, "attention", 4),
        ]
    ]
    groups = engine.generate(requests)
    assert [len(group) for group in groups] == [1, 3, 2, 4]
    for one, group in zip(requests, groups, strict=True):
        for sample in group:
            assert 1 <= len(sample.token_ids) == len(sample.logprobs) <= LONGEST
        # Only the right prompt and adapter explain a group's log-probabilities.
        torch.testing.assert_close(
            flat_logprobs([group]),
            trainer_logprobs(model, one.member, [one], [group]),
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_trainers(engine: Engine, model: PeftModel, temperature: float) -> None:
    requests = [
        request(length, member, n=3, seed=length, temperature=temperature)
        for length in (1, 8, 40)
        for member in MEMBERS
    ]
    groups = engine.generate(requests)
    for member in MEMBERS:
        indices = [i for i, one in enumerate(requests) if one.member == member]
        asked, got = [requests[i] for i in indices], [groups[i] for i in indices]
        engine_logprobs = flat_logprobs(got)
        assert torch.allclose(
            engine_logprobs, trainer_logprobs(model, member, asked, got), atol=1e-4
        )
        for other in set(MEMBERS) - {member}:
            assert (
                engine_logprobs - trainer_logprobs(model, other, asked, got)
            ).abs().mean() > 0.01


def test_samples_follow_the_distribution(engine: Engine, model: PeftModel) -> None:
    n = 4000
    one = request(7, "all_linear", n=n, longest=1)
    counts = torch.zeros(VOCAB)
    for sample in engine.generate([one])[0]:
        counts[sample.token_ids[0]] += 1
    expected = n * next_token_logits(model, "all_linear", one.prompt_token_ids)[-1].softmax(dim=-1)
    likely = expected >= 5
    chi_square = ((counts - expected).square() / expected)[likely].sum()
    freedom = int(likely.sum())
    assert freedom > 10
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_the_same_seed_gives_the_same_bits(engine: Engine) -> None:
    requests = [request(length, member, n=4, seed=5) for length in (6, 50) for member in MEMBERS]
    first, again = engine.generate(requests), engine.generate(requests)
    assert first == again


def test_other_seeds_and_samples_differ(engine: Engine) -> None:
    groups = engine.generate([request(9, "all_linear", n=4, seed=seed) for seed in (0, 1, 2)])
    completions = [tuple(sample.token_ids) for group in groups for sample in group]
    assert len(set(completions)) >= 11


def test_a_sample_does_not_depend_on_other_requests(engine: Engine) -> None:
    one = request(20, "attention", n=3, seed=3)
    others = [
        request(length, member, n=2, seed=length) for length in (1, 33, 90) for member in MEMBERS
    ]
    alone = engine.generate([one])[0]
    among = engine.generate([*others[:5], one, *others[5:]])[5]
    assert tokens([among]) == tokens([alone])
    assert torch.allclose(flat_logprobs([among]), flat_logprobs([alone]), atol=1e-4)


def test_fewer_samples_are_the_first_of_more(engine: Engine) -> None:
    first_two, five = (engine.generate([request(11, "all_linear", n=n, seed=4)])[0] for n in (2, 5))
    assert tokens([five[:2]]) == tokens([first_two])


def test_finish_reasons(engine: Engine) -> None:
    groups = engine.generate([request(length, None, n=16, seed=length) for length in (4, 5, 6)])
    samples = [sample for group in groups for sample in group]
    for sample in samples:
        *before, last = sample.token_ids
        assert not set(before) & set(STOP_TOKEN_IDS)
        if sample.finish_reason == "stop":
            assert last in STOP_TOKEN_IDS
        else:
            assert sample.finish_reason == "length"
            assert last not in STOP_TOKEN_IDS
            assert len(sample.token_ids) == LONGEST
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


def test_eos_at_the_length_limit_is_a_stop(engine: Engine) -> None:
    samples = engine.generate([request(4, None, n=64, longest=1)])[0]
    reasons = [(sample.token_ids[0] in STOP_TOKEN_IDS, sample.finish_reason) for sample in samples]
    assert set(reasons) == {(True, "stop"), (False, "length")}


def test_temperature_zero_is_greedy(engine: Engine, model: PeftModel) -> None:
    one = request(10, "all_linear", n=2, temperature=0.0)
    other = request(10, "all_linear", n=1, temperature=1.0)
    group = engine.generate([one, other])[0]
    assert tokens([group])[0][0] == tokens([group])[0][1]
    ids = [*one.prompt_token_ids, *group[0].token_ids]
    greedy = next_token_logits(model, "all_linear", ids)[len(one.prompt_token_ids) - 1 : -1].argmax(
        dim=-1
    )
    assert group[0].token_ids == greedy.tolist()
    expected = trainer_logprobs(model, "all_linear", [one], [group])  # at temperature 1
    assert torch.allclose(flat_logprobs([group]), expected, atol=1e-4)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (-1, 0.6), (20, 0.7)])
def test_truncated_distributions(
    engine: Engine, model: PeftModel, top_k: int, top_p: float
) -> None:
    one = request(10, "attention", n=4, temperature=1.3, top_k=top_k, top_p=top_p)
    for sample in engine.generate([one])[0]:
        ids = [*one.prompt_token_ids, *sample.token_ids]
        logits = (
            next_token_logits(model, "attention", ids)[len(one.prompt_token_ids) - 1 : -1] / 1.3
        )
        for t, token in enumerate(sample.token_ids):
            ordered, order = logits[t].sort(descending=True)
            kept = top_k if top_k > 0 else VOCAB
            probabilities = ordered[:kept].softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            allowed = order[:kept][before < top_p]
            assert token in allowed
            expected = logits[t][allowed].log_softmax(dim=-1)[allowed == token]
            assert sample.logprobs[t] == pytest.approx(expected.item(), abs=1e-4)


def test_more_prompt_tokens_than_one_batch_holds(engine: Engine, model: PeftModel) -> None:
    requests = [
        request(length, "all_linear", n=1, seed=length, longest=2) for length in range(20, 96)
    ]
    requests += [
        Request(prompt(95, seed), 1, seed, requests[0].sampling, "all_linear")
        for seed in range(1, 30)
    ]
    groups = engine.generate(requests)
    expected = trainer_logprobs(model, "all_linear", requests, groups)
    assert torch.allclose(flat_logprobs(groups), expected, atol=1e-4)


@pytest.mark.parametrize("length", [0, MAX_INPUT_LENGTH + 1])
def test_prompts_out_of_range_are_refused(engine: Engine, length: int) -> None:
    with pytest.raises(UserError, match=f"got: +{length} tokens"):
        engine.generate([request(4, None), request(length, None)])


def test_an_unknown_member_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match=r"(?s)no adapter.*nobody.*all_linear"):
        engine.generate([request(4, "nobody")])


def test_the_process_state_does_not_change(engine: Engine, model: PeftModel) -> None:
    model.train()
    model.set_adapter("attention")
    for name, parameter in model.named_parameters():
        if "lora_A.all_linear" in name:  # a pack also trains adapters that are not active
            parameter.requires_grad_(True)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index] # noqa: NPY002
    engine.generate([request(4, member) for member in MEMBERS])
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert np.random.get_state()[1].tobytes() == drawn[2]  # type: ignore[index] # noqa: NPY002
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    assert model.active_adapter == "attention"
    assert model.base_model.active_adapters == ["attention"]
    model.eval()


def test_threads_can_still_be_set(engine: Engine) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_dropped_adapters_are_gone(engine: Engine, model: PeftModel, tmp_path: Path) -> None:
    if engine.shares_weights:
        pytest.skip("the engine uses the trainer's adapters")
    engine.drop_adapter("attention")
    engine.drop_adapter("attention")
    with pytest.raises(UserError, match="no adapter"):
        engine.generate([request(4, "attention")])
    DiskSync(tmp_path).publish(engine, model, "attention", 2)
    asked = [request(4, "attention")]
    groups = engine.generate(asked)
    assert torch.allclose(
        flat_logprobs(groups), trainer_logprobs(model, "attention", asked, groups), atol=1e-4
    )


def test_an_adapter_loads_from_its_tensors(
    engine: Engine, model: PeftModel, tmp_path: Path
) -> None:
    asked = [request(8, "attention", n=3)]
    before = {name: tensor.clone() for name, tensor in adapter_tensors(model, "attention").items()}
    from_disk = engine.generate(asked)
    engine.drop_adapter("attention")
    engine.load_adapter_tensors(
        "attention", 5, adapter_tensors(model, "attention"), adapter_config(model, "attention")
    )
    assert engine.generate(asked) == from_disk
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in adapter_tensors(model, "attention").items()
    )


Load = Callable[[Engine, PeftModel, str, Path, Callable[[str], str]], None]


def _from_disk(
    engine: Engine, model: PeftModel, member: str, folder: Path, rename: Callable[[str], str]
) -> None:
    write_tensors(_renamed(model, rename), adapter_config(model, "attention"), folder)
    engine.load_adapter(member, 1, folder)


def _from_memory(
    engine: Engine, model: PeftModel, member: str, folder: Path, rename: Callable[[str], str]
) -> None:
    engine.load_adapter_tensors(
        member, 1, _renamed(model, rename), adapter_config(model, "attention")
    )


def _renamed(model: PeftModel, rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {rename(name): tensor for name, tensor in adapter_tensors(model, "attention").items()}


@pytest.mark.parametrize("load", [_from_disk, _from_memory])
def test_an_adapter_beyond_the_limit_is_refused(
    engine: Engine, model: PeftModel, tmp_path: Path, load: Load
) -> None:
    if engine.shares_weights:
        pytest.skip("the trainer's model has no limit")
    with pytest.raises(RuntimeError, match="room for 2 adapters"):
        load(engine, model, "third", tmp_path, str)


@pytest.mark.parametrize("load", [_from_disk, _from_memory])
def test_a_module_that_the_engine_cannot_serve_is_detected(
    engine: Engine, model: PeftModel, tmp_path: Path, load: Load
) -> None:
    if engine.shares_weights:
        pytest.skip("the engine uses the trainer's modules")
    # A layer that the model does not have: vLLM itself reports nothing.
    with pytest.raises(SyncError, match="3 of the 6 modules"):
        load(
            engine,
            model,
            "attention",
            tmp_path / "stray",
            lambda name: name.replace("layers.1.", "layers.7."),
        )
    with pytest.raises(UserError, match="no adapter"):
        engine.generate([request(4, "attention")])
    load(engine, model, "attention", tmp_path / "good", str)
    asked = [request(6, member) for member in ADAPTERS]
    groups = engine.generate(asked)
    for i, member in enumerate(ADAPTERS):
        expected = trainer_logprobs(model, member, asked[i : i + 1], groups[i : i + 1])
        assert torch.allclose(flat_logprobs(groups[i : i + 1]), expected, atol=1e-4)


def test_a_failed_call_leaves_no_requests(
    model: PeftModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = getattr(engine, "_llm", None)
    if llm is None:
        pytest.skip("no vLLM in this process")
    asked = [request(9, None, n=2)]
    expected = engine.generate(asked)
    step, steps = llm.llm_engine.step, iter(range(3))

    def fail_at_the_fourth() -> object:
        next(steps)
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine, "step", fail_at_the_fourth)
        with pytest.raises(StopIteration):
            engine.generate([request(12, None, n=4, seed=1)])
    assert not llm.llm_engine.has_unfinished_requests()
    assert engine.generate(asked) == expected


def test_prompts_are_distributed_among_engines(
    engine: Engine, model: PeftModel, tmp_path: Path
) -> None:
    if not isinstance(engine, RemoteEngines):
        pytest.skip("one engine")
    # Only the second engine lacks the adapter, so its share of the prompts fails.
    second = RemoteEngines(engine._actors[1:])
    second.drop_adapter("attention")
    asked = [
        request(length, member)
        for length, member in [(5, "attention"), (6, None), (7, "attention"), (8, None)]
    ]
    assert [len(group) for group in engine.generate(asked)] == [2, 2, 2, 2]
    with pytest.raises(UserError, match="no adapter is loaded"):
        engine.generate(asked[1:])
    DiskSync(tmp_path).publish(second, model, "attention", 9)
    assert len(engine.generate(asked[1:])) == 3
