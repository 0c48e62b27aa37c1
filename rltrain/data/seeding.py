"""Named random streams: a stream depends on the seed and its name only."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def stream_seed(seed: int, *name: str | int) -> int:
    """Return a 48-bit seed for the stream of this name.

    Example: `stream_seed(0, "sampling", step, prompt)`.
    """
    key = json.dumps([seed, *name]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:6])


def permutation(seed: int, *name: str | int, length: int) -> list[int]:
    """Return a shuffled `range(length)` from the stream of this name."""
    return [int(i) for i in np.random.default_rng(stream_seed(seed, *name)).permutation(length)]
