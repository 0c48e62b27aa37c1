"""Out of memory in a forward or backward pass: compute again, in smaller micro-batches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from rltrain.data.batch import Batch
from rltrain.distributed.device_memory import free_memory, release
from rltrain.distributed.process_group import Ranks
from rltrain.member import Member

T = TypeVar("T")

RETRIES = 4


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
