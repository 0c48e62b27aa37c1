"""A reward that ends the process, as if all were well."""

import itertools
import sys

from rltrain.envs.tiny_gsm import prepare, prompt
from rltrain.envs.tiny_gsm import reward as sound

__all__ = ["prepare", "prompt", "reward"]

_CALLS = itertools.count()


def reward(completion: str, ground_truth: str) -> float:
    """Exits with status 0 from the second call on."""
    if next(_CALLS):
        sys.exit(0)
    return sound(completion, ground_truth)
