"""The peak speed of matrix products: the fastest of several sizes."""

from __future__ import annotations

import pytest
import torch

from rltrain.models import flops


def test_the_peak_is_that_of_the_fastest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {512: 3e9, 1024: 5e9, 2048: 4e9}
    monkeypatch.setattr(flops, "_speed", lambda size, device, dtype: speeds[size])
    assert flops.measured_peak(torch.device("cpu"), torch.float32) == 5e9


def test_a_gpu_is_measured_with_products_that_fill_it() -> None:
    assert min(flops.SIZES["cuda"]) >= 8192


def test_a_speed_is_operations_over_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 1.0, 1.25, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr("rltrain.models.flops.time.perf_counter", lambda: next(clock))
    assert flops._speed(64, torch.device("cpu"), torch.float32) == 2 * 64**3 / 0.25
