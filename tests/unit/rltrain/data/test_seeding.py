"""Named random streams."""

from __future__ import annotations

import torch

from rltrain.data.seeding import permutation, stream_seed

CPU = torch.device("cpu")


def test_streams_depend_on_seed_and_name_only() -> None:
    assert stream_seed(0, "sampling", 3, 1) == stream_seed(0, "sampling", 3, 1)
    seeds = {
        stream_seed(s, name, i) for s in (0, 1) for name in ("sampling", "eval") for i in range(100)
    }
    assert len(seeds) == 400
    assert all(0 <= seed < 2**48 for seed in seeds)


def test_permutation_is_a_reproducible_shuffle() -> None:
    order = permutation(3, "data", 0, length=50)
    assert sorted(order) == list(range(50))
    assert order == permutation(3, "data", 0, length=50)
    assert order != permutation(3, "data", 1, length=50)
