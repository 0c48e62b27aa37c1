"""How fast this machine multiplies matrices: the peak that model-FLOPs utilisation refers to."""

from __future__ import annotations

import time

import torch

REPEATS = 5
# Square products by device: a GPU needs large ones to reach its peak, a CPU depends on its caches.
SIZES = {"cuda": (8192,), "cpu": (256, 512, 1024)}


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of the fastest of a few square matrix products, measured in about 100 ms.

    It depends on the number of threads.
    """
    return max(_speed(size, device, dtype) for size in SIZES[device.type])


def _speed(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of the fastest of `REPEATS` products of `size` x `size` matrices."""
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
