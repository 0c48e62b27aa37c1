"""How fast this machine multiplies matrices: the peak that model-FLOPs utilisation refers to."""

from __future__ import annotations

import time

import torch

REPEATS = 3
# Square products by device: a GPU needs large ones to reach its peak, a CPU depends on its caches.
SIZES = {"cuda": (8192,), "cpu": (512, 1024, 2048)}


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of the fastest of a few square matrix products, in a fraction of a second.

    It depends on the number of threads. A process that shares its cores measures too little.
    """
    return max(_speed(size, device, dtype) for size in SIZES[device.type])


def _speed(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of the fastest of `REPEATS` products of `size` x `size` matrices."""
    left = torch.rand(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.nn.functional.linear(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
