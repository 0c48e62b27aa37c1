"""Arithmetic of a step, and how fast this machine multiplies: the two sides of model-FLOPs
utilisation.
"""

from __future__ import annotations

import time

import torch

REPEATS = 5
# Square products by device: a GPU needs large ones to reach its peak, and which one suits a CPU
# depends on its caches.
SIZES = {"cuda": (8192,), "cpu": (256, 512, 1024)}


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square matrix products, with the threads set now; takes some
    100 ms.
    """
    return max(_speed(size, device, dtype) for size in SIZES[device.type])


def _speed(size: int, device: torch.device, dtype: torch.dtype) -> float:
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def step_flops(num_parameters: int, tokens: int, *, forwards: int, full: bool) -> float:
    """Model FLOPs of a step over `tokens` tokens: one rollout, `forwards` more passes, one backward
    pass.

    2 FLOPs a parameter and token forward, 2 backward for activations and, in full fine-tuning, 2
    for the weights (Kaplan et al. 2020, section 2.1); attention and the adapters' own are left out.
    """
    backward = 4 if full else 2
    return num_parameters * tokens * (2.0 + 2.0 * forwards + backward)
