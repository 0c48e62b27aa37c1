"""How many tokens a run's micro-batches hold, found out before its first step."""

from __future__ import annotations

import torch

from harness.config import recipe as recipes
from harness.records.files import write_text
from rltrain.algorithms.trained_model import TrainedModel
from rltrain.data.batch import Batch, collate
from rltrain.member import Member
from rltrain.out_of_memory import with_smaller_passes
from rltrain.pack import Pack
from rltrain.step import accumulate_gradients

KEY = "trainer.max_tokens_per_microbatch"


def settle_micro_batch_size(pack: Pack, member: Member) -> None:
    """Where the recipe says `auto`, try whether the estimate fits, and write the number down.

    A resumed run and a reproduction then compute the same. Only a GPU needs the trial, which is
    left out where an earlier member's was as large.
    """
    if member.recipe.trainer.max_tokens_per_microbatch != "auto":
        return
    assert member.max_tokens is not None
    if pack.device.type == "cuda" and member.max_tokens > pack.tried_tokens:
        with pack.engine_asleep():
            try_largest_micro_batch(pack, member)
        pack.tried_tokens = member.max_tokens
    member.recipe.trainer.max_tokens_per_microbatch = member.max_tokens

    def write() -> None:
        file = member.run_dir.recipe
        if file.exists():
            recipe = recipes.with_values(recipes.read(file), {KEY: member.max_tokens})
            write_text(file, recipes.to_yaml(recipe))

    pack.ranks.once(write)


def try_largest_micro_batch(pack: Pack, member: Member) -> None:
    """Try a pass over the longest possible sequences; lower the limit if it is too large."""
    for model in member.trained_models:
        model.activate()

        def compute(model: TrainedModel = model) -> object:
            return accumulate_gradients(pack, member, model, _longest_sequences(pack, member), 0)

        with_smaller_passes(member, pack.ranks, compute)
        model.optimizer.zero_grad()


def _longest_sequences(pack: Pack, member: Member) -> Batch:
    """Return as many sequences of the greatest length as fit into one micro-batch per rank."""
    generator, token = member.recipe.generator, pack.pad_id
    prompt, length = generator.max_input_length, generator.sampling_params.max_generate_length
    assert member.max_tokens is not None
    count = max(1, member.max_tokens // (prompt + length)) * pack.ranks.size
    # Prompts differ in their first token: equal ones would be computed once.
    prompts = [[i % pack.vocabulary_size, *[token] * (prompt - 1)] for i in range(count)]
    batch = collate(prompts, [[token] * length] * count, [[0.0] * length] * count, pad_id=token)
    for name in ("old_logprobs", "ref_logprobs", "values", "returns", "advantages"):
        setattr(batch, name, torch.ones_like(batch.mask))
    return batch
