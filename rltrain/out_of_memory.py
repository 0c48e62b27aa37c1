"""Out of memory in a pass: what was computed is computed again from its start, in smaller
passes.
"""

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
    """A pass ran out of memory; `tokens` are those of the largest pass planned, `sequences` those
    in it.
    """

    def __init__(self, passes: Sequence[Batch], reason: str) -> None:
        largest = max(passes, key=lambda one: one.packed_tokens)
        self.sequences, self.tokens = len(largest), largest.packed_tokens
        helps = "shorter sequences, trainer.gradient_checkpointing=true or a GPU with more memory"
        if self.sequences > 1:
            helps = f"trainer.max_tokens_per_microbatch={self.tokens // 2}"
        super().__init__(
            f"out of memory in a pass over {self.sequences} sequences, {self.tokens} "
            f"tokens: {reason}; what would "
            f"help: {helps}"
        )


@contextlib.contextmanager
def checked(passes: Sequence[Batch]) -> Iterator[None]:
    """Raise PassTooLarge where one of these passes runs out of memory; nothing keeps its tensors
    alive.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        release(error)
        reason = str(error).split(". ")[0]
        raise PassTooLarge(passes, reason) from None


def with_smaller_passes(member: Member, ranks: Ranks, attempt: Callable[[], T]) -> T:
    """Call `attempt`; where a pass is too large, again with passes of half the tokens, at most four
    times.

    `attempt` must begin anew each time, and cut its passes by `member.max_tokens`. What fails with
    one sequence in a pass, or on one of several ranks, which would wait for it, is raised.
    """
    for _ in range(RETRIES):
        try:
            return attempt()
        except PassTooLarge as error:
            if error.sequences == 1 or ranks.size > 1:
                raise
            tokens = max(1, error.tokens // 2)
        free_memory()
        member.limit_passes(tokens)
        print(
            f"out of memory at step {member.step + 1}: passes have at most {tokens} tokens "
            "from now on",
            file=sys.stderr,
            flush=True,
        )
    return attempt()
