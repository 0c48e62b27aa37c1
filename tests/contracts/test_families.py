"""Every family of models: load, adapt, train, sample, sync and export, on tiny random models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from harness.config import recipe as recipes
from harness.config.schema import Recipe, Sampling, SyncMode
from harness.core.paths import PROJECT
from harness.records import manifest
from harness.records.run_dir import RunDir, Status
from rltrain.data.batch import Batch, collate
from rltrain.engines.base import (
    Engine,
    EngineOptions,
    Request,
    Sample,
    build_engine,
    stop_token_ids,
)
from rltrain.models import attention, logprobs
from rltrain.models.loading import (
    adapter_layers,
    adapter_parameters,
    add_adapter,
    load_base,
    lora_config,
)
from rltrain.models.logprobs import at_predictors, token_logprobs
from rltrain.models.lora import adapter_off
from rltrain.sync.disk import write_adapter
from rltrain.sync.registry import build_sync
from rltrain.tools import export
from rltrain.tools.preflight import WITHOUT_ADAPTERS
from tests.contracts.families import FAMILIES, LAYERS, Family, write_model
from tests.recipes import quickstart

MEMBERS = {
    targets: f"on_{targets.replace('-', '_')}"
    for targets in ("all-linear", "attention", "mlp", "experts")
}
CHATS = [
    "Tom has 3 apples.",
    "Ann buys 12 pens and gives 5 away. How many pens does Ann have left?",
    "2 + 2?",
]


@dataclass(frozen=True)
class Case:
    """Recipe and model of a family: a frozen base with several adapters, B not zero."""

    family: Family
    recipe: Recipe
    model: PeftModel
    tokenizer: Any

    @property
    def members(self) -> dict[str, str]:
        """Return the members by their targets: of a dense model none is on experts."""
        return {
            targets: member
            for targets, member in MEMBERS.items()
            if targets != "experts" or self.family.mixture
        }

    def engine(self, backend: str, *, adapters: bool = True) -> Engine:
        """Return a new engine that serves the base and, once published, the adapters."""
        recipe = recipes.with_values(self.recipe, {"generator.backend": backend})
        stops = stop_token_ids(self.model, self.tokenizer)
        path = recipe.trainer.policy.model.path
        options = EngineOptions(
            path, torch.float32, stops, 4 if adapters else 0, max_loras=len(self.members)
        )
        return build_engine(recipe, self.model, options)

    def requests(self, member: str | None, temperature: float) -> list[Request]:
        """Return requests for three samples of each of CHATS."""
        prompts = self.tokenizer.apply_chat_template(
            [[{"role": "user", "content": chat}] for chat in CHATS],
            add_generation_prompt=True,
            return_dict=False,
        )
        sampling = Sampling(max_generate_length=24, temperature=temperature)
        return [Request(ids, 3, seed, sampling, member) for seed, ids in enumerate(prompts)]

    def logprobs(self, member: str | None, batch: Batch, temperature: float) -> torch.Tensor:
        """Return the trainer's log-probabilities of all completions, concatenated.

        Member None means the base.
        """
        with torch.no_grad():
            if member is None:
                with adapter_off(self.model):
                    values = token_logprobs(self.model, batch, temperature)
            else:
                self.model.set_adapter(member)
                values = token_logprobs(self.model, batch, temperature)
        return values[batch.mask.bool()]


@pytest.fixture(scope="module", params=FAMILIES)
def case(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(family.model_type)
    write_model(family, folder, tiny_model_dir)
    recipe = quickstart(
        [
            f"trainer.policy.model.path={folder}",
            "trainer.policy.model.lora.rank=4",
            "generator.backend=transformers",
        ]
    )
    model: PreTrainedModel | PeftModel
    model, tokenizer = load_base(recipe)
    for seed, (targets, member) in enumerate(MEMBERS.items()):
        if targets == "experts" and not family.mixture:
            continue
        adapter_recipe = recipes.with_values(recipe, {"trainer.target_modules": targets})
        config = lora_config(adapter_recipe, adapter_recipe.trainer.policy.model.lora)
        model = add_adapter(model, member, config, seed)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert isinstance(model, PeftModel)
    return Case(family, recipe, model.eval(), tokenizer)


def collated(requests: Sequence[Request], groups: Sequence[Sequence[Sample]]) -> Batch:
    samples = [sample for group in groups for sample in group]
    prompts = [request.prompt_token_ids for request in requests for _ in range(request.n)]
    return collate(prompts, [s.token_ids for s in samples], [s.logprobs for s in samples], pad_id=0)


def some_batch(case: Case) -> Batch:
    """Return prompts of several lengths, one of them shared, with completions past any window."""
    short, long, other = [list(request.prompt_token_ids) for request in case.requests(None, 1.0)]
    completions = [[20, 30, 40, 50] * 5, [60], [70, 80] * 8, [90, 95, 20] * 6]
    zeros = [[0.0] * len(completion) for completion in completions]
    return collate([short, long, other, other], completions, zeros, pad_id=0)


def assert_served(case: Case, engine: Engine, members: Sequence[str | None]) -> None:
    """Assert that engine and trainer agree on the log-probabilities of what members sample."""
    for member, temperature in [*((member, 1.0) for member in members), (members[0], 0.7)]:
        requests = case.requests(member, temperature)
        batch = collated(requests, engine.generate(requests))
        sampled = batch.engine_logprobs[batch.mask.bool()]
        torch.testing.assert_close(
            sampled, case.logprobs(member, batch, temperature), atol=1e-4, rtol=0
        )
        for other in {None, *case.members.values()} - {member}:
            assert (sampled - case.logprobs(other, batch, temperature)).abs().mean() > 0.01


def test_the_guides_table_has_each_family_and_how_vllm_serves_it() -> None:
    page = (PROJECT / "docs/guides/your_model.md").read_text()
    table = page.partition("## Families")[2].partition("|---|")[2].partition("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[1:]]
    assert {row[0]: "adapters or merged" in row[3] for row in rows} == {
        name: family.adapters for name, family in FAMILIES.items()
    }
    assert all("packed" in row[1] for row in rows)


def test_the_base_is_loaded_frozen_in_float32_with_its_tokenizer(
    case: Case, tiny_model_dir: Path
) -> None:
    base = [p for name, p in case.model.named_parameters() if "lora_" not in name]
    assert {p.dtype for p in base} == {torch.float32}
    assert not any(p.requires_grad for p in base)
    assert case.model.get_input_embeddings().weight.shape == (896, 64)
    text = "Ann has 17 pens, 2 of them blue.\n#### 17"
    assert case.tokenizer.decode(case.tokenizer(text)["input_ids"]) == text
    template = (tiny_model_dir / "chat_template.jinja").read_text()
    assert case.tokenizer.chat_template == template


def test_an_adapter_is_on_its_modules_in_every_layer_and_trains(case: Case) -> None:
    sets = case.family.modules
    for targets, member in case.members.items():
        expected = sets["attention"] | sets["mlp"] if targets == "all-linear" else sets[targets]
        layers = adapter_layers(case.model, member)
        assert len(layers) == LAYERS * len(expected)
        assert all(any(name.endswith(f".{part}") for part in expected) for name in layers)

        case.model.set_adapter(member)
        batch = collate([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], [[0.0] * 2, [0.0] * 3], pad_id=0)
        parameters = adapter_parameters(case.model, member)
        (token_logprobs(case.model, batch, 1.0) * batch.mask).sum().backward()
        assert len(parameters) == 2 * len(layers)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
        assert all(
            p.grad is None for name, p in case.model.named_parameters() if name not in parameters
        )
        case.model.zero_grad(set_to_none=True)


def test_training_sees_what_evaluation_sees(case: Case) -> None:
    batch = some_batch(case)
    expected = case.logprobs("on_all_linear", batch, 1.0)
    try:
        case.model.train()
        assert torch.equal(case.logprobs("on_all_linear", batch, 1.0), expected)
    finally:
        case.model.eval()


def test_a_critics_values_are_what_its_head_computes(case: Case) -> None:
    batch = some_batch(case)
    with torch.no_grad():
        values = at_predictors(case.model, batch, lambda hidden: torch.full((len(hidden), 1), 2.5))
    assert values.shape == (batch.tokens, 1)
    assert values.eq(2.5).all()


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("merged", [False, True])
def test_an_export_gives_each_sequence_alone_what_the_trainer_computes_together(
    case: Case, tmp_path: Path, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention.can_pack(case.model.config)
    run = RunDir(tmp_path / "run")
    record = manifest.build(case.recipe, kind="run", name="run", source="quickstart")
    run.create(recipes.to_yaml(case.recipe), record)
    run.update(status=Status.COMPLETE.value)
    batch = some_batch(case)
    for member in case.members.values():
        write_adapter(case.model, member, run.adapter / "final")
        folder = tmp_path / member
        export.write(export.plan(run.path, folder, merged=merged))
        card = (folder / "README.md").read_text()
        on_experts = case.family.mixture and member != "on_attention"
        assert ("vllm serve" in card) is (merged or not on_experts)
        # transformers' own attention, which computes all scores.
        path = folder if merged else case.recipe.trainer.policy.model.path
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        model = model if merged else PeftModel.from_pretrained(model, folder)
        expected = torch.cat([_plain_logprobs(model.eval(), batch, row) for row in range(4)])
        for packs in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(logprobs, "can_pack", lambda _, packs=packs: packs)
                found = case.logprobs(member, batch, 1.0)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def _plain_logprobs(model: Any, batch: Batch, row: int) -> torch.Tensor:
    prompt, completion = (
        ids[row][mask[row].bool()]
        for ids, mask in (
            (batch.prompt_ids, batch.prompt_mask),
            (batch.completion_ids, batch.mask),
        )
    )
    logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1).gather(1, completion[:, None])[:, 0]


def test_the_transformers_engine_samples_what_the_trainer_computes(case: Case) -> None:
    assert_served(case, case.engine("transformers"), [*case.members.values(), None])


def test_a_random_models_completions_decode(case: Case) -> None:
    (group, *_) = case.engine("transformers").generate(case.requests(None, 1.0))
    # 895 is beyond the tokenizer's tokens.
    sample = Sample([*group[0].token_ids, 895, 5], [0.0], "length")
    assert case.tokenizer.batch_decode([sample.token_ids], skip_special_tokens=True)[0].endswith(
        case.tokenizer.decode([5])
    )


def test_vllm_has_no_adapters_where_a_run_is_refused() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    models = {name: ModelRegistry._try_load_model_cls(name) for name in WITHOUT_ADAPTERS}
    assert [name for name, model in models.items() if model is None or supports_lora(model)] == []


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=() if name in ("Qwen2", "Gemma 2") else pytest.mark.slow)
        for name, family in FAMILIES.items()
        if family.adapters
    ],
    indirect=True,
)
def test_vllm_serves_the_base_and_its_adapters(case: Case, tmp_path: Path) -> None:
    engine = case.engine("vllm")
    try:
        for version, mode in enumerate([SyncMode.memory, SyncMode.disk]):
            sync = build_sync(mode, tmp_path)
            for member in case.members.values():
                sync.publish(engine, case.model, member, version)
            assert_served(case, engine, [*case.members.values(), None])
    finally:
        engine.close()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=() if name in ("GPT-2", "Qwen3-MoE") else pytest.mark.slow)
        for name in FAMILIES
    ],
    indirect=True,
)
def test_vllm_serves_merged_weights(case: Case, tmp_path: Path) -> None:
    engine = case.engine("vllm", adapters=False)
    try:
        sync = build_sync(SyncMode.merge, tmp_path)
        for version, member in enumerate(case.members.values()):
            sync.publish(engine, case.model, member, version)
            requests = case.requests(None, 1.0)
            batch = collated(requests, engine.generate(requests))
            sampled = batch.engine_logprobs[batch.mask.bool()]
            expected = case.logprobs(member, batch, 1.0)
            torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=0)
            for other in {None, *case.members.values()} - {member}:
                assert (sampled - case.logprobs(other, batch, 1.0)).abs().mean() > 0.01
    finally:
        engine.close()
