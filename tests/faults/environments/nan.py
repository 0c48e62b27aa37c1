"""Reward that is not a number."""

import math


def reward(completion: str, ground_truth: str) -> float:
    """Return NaN."""
    return math.nan
