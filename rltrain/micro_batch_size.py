"""Micro-batches that fit into memory: their size, and what to do when one does not fit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from harness.config import recipe as recipes
from harness.records.files import write_text
from rltrain.algorithms.trained_model import TrainedModel
from rltrain.data.batch import Batch, collate
from rltrain.data.micro_batches import micro_batches, shares
from rltrain.distributed.device_memory import free_memory, release
from rltrain.distributed.process_group import Ranks
from rltrain.member import Member
from rltrain.pack import Pack

T = TypeVar("T")
# `rltrain.step.accumulate_gradients`.
Accumulate = Callable[[Pack, Member, TrainedModel, Batch, int], object]

KEY = "trainer.max_tokens_per_microbatch"
RETRIES = 4


def settle_micro_batch_size(pack: Pack, member: Member, accumulate: Accumulate) -> None:
    """Where the recipe says `auto`, try whether the estimate fits, and write the number down.

    A resumed run and a reproduction then compute the same. Only a GPU needs the trial, which is
    left out where an earlier member's was as large.
    """
    if member.recipe.trainer.max_tokens_per_microbatch != "auto":
        return
    assert member.max_tokens is not None
    if pack.device.type == "cuda" and member.max_tokens > pack.tried_tokens:
        with pack.engine_asleep():
            try_largest_micro_batch(pack, member, accumulate)
        pack.tried_tokens = member.max_tokens
    member.recipe.trainer.max_tokens_per_microbatch = member.max_tokens

    def write() -> None:
        file = member.run_dir.recipe
        if file.exists():
            recipe = recipes.with_values(recipes.read(file), {KEY: member.max_tokens})
            write_text(file, recipes.to_yaml(recipe))

    pack.ranks.once(write)


def try_largest_micro_batch(pack: Pack, member: Member, accumulate: Accumulate) -> None:
    """Try a pass over the longest possible sequences; lower the limit if it is too large."""
    for model in member.trained_models:
        model.activate()

        def compute(model: TrainedModel = model) -> object:
            return accumulate(pack, member, model, _longest_sequences(pack, member), 0)

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


class PassTooLarge(RuntimeError):
    """A pass ran out of memory; `tokens` and `sequences` are those of the largest micro-batch."""

    def __init__(self, micros: Sequence[Batch], reason: str) -> None:
        largest = max(micros, key=lambda micro: micro.packed_tokens)
        self.sequences, self.tokens = len(largest), largest.packed_tokens
        fix = "shorter sequences, trainer.gradient_checkpointing=true or a GPU with more memory"
        if self.sequences > 1:
            fix = f"trainer.max_tokens_per_microbatch={self.tokens // 2}"
        super().__init__(
            f"out of memory in a pass over {self.sequences} sequences, {self.tokens} tokens: "
            f"{reason}; what would help: {fix}"
        )


@contextlib.contextmanager
def checked(micros: Sequence[Batch]) -> Iterator[None]:
    """Raise PassTooLarge where one of these micro-batches runs out of memory; keep no tensors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        release(error)
        reason = str(error).split(". ")[0]
        raise PassTooLarge(micros, reason) from None


def with_smaller_passes(member: Member, ranks: Ranks, compute: Callable[[], T]) -> T:
    """Call `compute`; where it runs out of memory, again with half the tokens, four times at most.

    `compute` must start anew each time and cut its micro-batches by `member.max_tokens`. The error
    is raised where a single sequence is too large, and with several ranks, which would wait.
    """
    for _ in range(RETRIES):
        try:
            return compute()
        except PassTooLarge as error:
            if error.sequences == 1 or ranks.size > 1:
                raise
            tokens = max(1, error.tokens // 2)
        free_memory()
        member.limit_tokens(tokens)
        print(
            f"out of memory at step {member.step + 1}: passes have at most {tokens} tokens from "
            "now on",
            file=sys.stderr,
            flush=True,
        )
    return compute()


@torch.no_grad()
def in_micro_batches(
    pack: Pack, member: Member, batch: Batch, compute: Callable[[Batch], torch.Tensor]
) -> torch.Tensor:
    """Compute `[B, T]` in micro-batches, zeros where there is no token; ranks share the rows."""
    ranks, size = pack.ranks, member.recipe.trainer.micro_forward_batch_size_per_gpu

    def attempt() -> torch.Tensor:
        plans = [
            micro_batches(batch, rows, size, member.max_tokens)
            for rows in shares(range(len(batch)), ranks.size)
        ]
        # A sharded model computes on all ranks at once. A rank that has fewer micro-batches than
        # others computes row 0 again, and drops the result.
        plan = plans[ranks.rank] + [[]] * (max(map(len, plans)) - len(plans[ranks.rank]))
        micros = [batch.take(rows or [0]) for rows in plan]
        with checked(micros):
            values = [compute(micro) for micro in micros]
        result = torch.zeros_like(batch.mask)
        for rows, value in zip(plan, values, strict=True):
            if rows:
                result[rows, : value.shape[1]] = value.cpu()
        return ranks.sum_rows(result * batch.mask)

    return with_smaller_passes(member, ranks, attempt)
