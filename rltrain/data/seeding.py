"""Named random streams: one seed, split so that a stream depends on nothing but the seed and its
name.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def stream_seed(seed: int, *name: str | int) -> int:
    """A 48-bit seed for the stream with this name, e.g. `stream_seed(0, "sampling", step,
    prompt)`.
    """
    key = json.dumps([seed, *name]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:6])


def permutation(seed: int, *name: str | int, length: int) -> list[int]:
    """A shuffled `range(length)` from the stream with this name."""
    return [int(i) for i in np.random.default_rng(stream_seed(seed, *name)).permutation(length)]
