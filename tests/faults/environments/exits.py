"""Reward that ends the process with status 0."""

import sys


def reward(completion: str, ground_truth: str) -> float:
    """Never return."""
    sys.exit(0)
