"""A reward that is not a number."""

import math

from rltrain.envs.tiny_gsm import prepare, prompt

__all__ = ["prepare", "prompt", "reward"]


def reward(completion: str, ground_truth: str) -> float:
    """Not a number."""
    return math.nan
