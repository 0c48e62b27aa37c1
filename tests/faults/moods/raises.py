"""A reward with a bug."""

from rltrain.envs.tiny_gsm import prepare, prompt

__all__ = ["prepare", "prompt", "reward"]


def reward(completion: str, ground_truth: str) -> float:
    """Never comes back with a number."""
    raise LookupError(f"no score for {ground_truth}")
