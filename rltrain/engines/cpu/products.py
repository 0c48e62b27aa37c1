"""Matrix products on a CPU in which a row's bits do not depend on the other rows."""

from __future__ import annotations

import torch

FEWEST_ROWS = 16
"""Rows in x W^T: with fewer, MKL uses another kernel where rows are 24 times as wide as many."""


def fewest_rows() -> int:
    """Return the rows that x W^T needs to round each of them as among any others; pad to these."""
    return FEWEST_ROWS * torch.get_num_threads()


def fewest_in_batch(width: int) -> int:
    """Return `fewest_rows` for each product of a batch, which threads do not split.

    Rows of this `width` need no more.
    """
    return max(4, min(FEWEST_ROWS, width // 24 + 1))
