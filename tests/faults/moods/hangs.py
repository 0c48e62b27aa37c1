"""A reward that waits for what never comes."""

import threading

from rltrain.envs.tiny_gsm import prepare, prompt

__all__ = ["prepare", "prompt", "reward"]


def reward(completion: str, ground_truth: str) -> float:
    """Never comes back."""
    threading.Event().wait()
    return 0.0
