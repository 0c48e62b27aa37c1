"""How many tokens a run's passes have, settled before its first step and written into its
recipe.
"""

from __future__ import annotations

import torch

from harness.config import recipe as recipes
from harness.records.files import write_text
from rltrain.data.batch import Batch, collate
from rltrain.member import Member
from rltrain.out_of_memory import with_smaller_passes
from rltrain.pack import Pack
from rltrain.step import MiniBatch, accumulate_gradients

KEY = "trainer.max_tokens_per_microbatch"


def settle_passes(pack: Pack, member: Member) -> None:
    """Where the recipe leaves the tokens of a pass open, see that a pass of so many fits, and write
    their number down.

    A resumed run and a repetition then compute the same. Only a GPU tells that its memory is full,
    by an error; there one pass is made for real, unless an earlier member's was as large.
    """
    if member.recipe.trainer.max_tokens_per_microbatch != "auto":
        return
    assert member.max_tokens is not None
    if pack.device.type == "cuda" and member.max_tokens > pack.tried_tokens:
        with pack.engine_asleep():
            try_pass(pack, member)
        pack.tried_tokens = member.max_tokens
    member.recipe.trainer.max_tokens_per_microbatch = member.max_tokens
    pack.ranks.once(lambda: _write(member))


def try_pass(pack: Pack, member: Member) -> None:
    """Forward and backward over one pass of the longest sequences there may be; too large, it is
    made smaller.
    """
    for learner in member.learners:
        learner.activate()
        with_smaller_passes(
            member,
            pack.ranks,
            lambda: accumulate_gradients(
                pack,
                MiniBatch(member, learner, 0, _longest(pack, member)),  # noqa: B023
            ),
        )
        learner.optimizer.zero_grad()


def _longest(pack: Pack, member: Member) -> Batch:
    """Sequences of the greatest length, one prompt each, as many as a pass has room for; all tokens
    train.
    """
    generator, token = member.recipe.generator, pack.stop_token_ids[0]
    prompt, length = generator.max_input_length, generator.sampling_params.max_generate_length
    assert member.max_tokens is not None
    count = max(1, member.max_tokens // (prompt + length)) * pack.ranks.size
    # Prompts differ in their first token, or they would be computed once.
    prompts = [[place % pack.vocabulary, *[token] * (prompt - 1)] for place in range(count)]
    batch = collate(prompts, [[token] * length] * count, [[0.0] * length] * count, pad_id=token)
    for name in ("old_logprobs", "ref_logprobs", "values", "returns", "advantages"):
        setattr(batch, name, torch.ones_like(batch.mask))
    return batch


def _write(member: Member) -> None:
    file = member.run_dir.recipe
    if file.exists():
        stored = recipes.with_values(recipes.read(file), {KEY: member.max_tokens})
        write_text(file, recipes.to_yaml(stored))
