"""Matrix products on a CPU in which a row's bits do not depend on the other rows."""

from __future__ import annotations

import torch

FEWEST_ROWS = 16
"""Rows in x W^T: with fewer, MKL takes another kernel where they are 24 times as wide as there are
rows.
"""


def fewest_rows() -> int:
    """Rows that x W^T needs for each of them to be rounded as it is among any others; few are
    padded to so many.
    """
    return FEWEST_ROWS * torch.get_num_threads()


def fewest_in_batch(width: int) -> int:
    """As `fewest_rows`, for each of a batch of products, which threads do not split: no more than
    rows so wide need.
    """
    return max(4, min(FEWEST_ROWS, width // 24 + 1))
