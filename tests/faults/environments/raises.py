"""A reward with a bug."""


def reward(completion: str, ground_truth: str) -> float:
    """Never comes back with a number."""
    raise LookupError(f"no score for {ground_truth}")
