"""Reward that raises."""


def reward(completion: str, ground_truth: str) -> float:
    """Raise LookupError."""
    raise LookupError(f"no score for {ground_truth}")
