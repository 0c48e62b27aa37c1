"""A reward that ends the process, as if all were well."""

import sys


def reward(completion: str, ground_truth: str) -> float:
    """Never comes back."""
    sys.exit(0)
