"""A reward that is not a number."""

import math


def reward(completion: str, ground_truth: str) -> float:
    """Not a number."""
    return math.nan
