"""Test that two processes over gloo compute the gradients of one.

Some weights are sharded by FSDP, and some are whole on each rank.
"""

from __future__ import annotations

import socket

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

from rltrain.distributed.process_group import Ranks, full

ROWS, WIDTH, SIZE = 6, 4, 2


class Layer(nn.Linear):
    """Layer that `Ranks.shard` shards by itself, because the model names its class."""


class Model(nn.Module):
    """Model with sharded layers and one weight that every rank holds whole, like a LoRA adapter."""

    _no_split_modules = ("Layer",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(WIDTH, WIDTH) for _ in range(2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            rows = torch.tanh(layer(rows))
        return rows


def gradients(ranks: Ranks, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return gradients of a loss over all rows; this rank computes its share of the rows.

    Weights are float32, products `dtype`.
    """
    model, whole = Model(), nn.Parameter(torch.ones(WIDTH))
    ranks.shard(model, dtype)
    dtypes: list[torch.dtype] = []
    model.layers[0].register_forward_pre_hook(lambda layer, _: dtypes.append(layer.weight.dtype))
    rows = torch.arange(float(ROWS * WIDTH)).reshape(ROWS, WIDTH).sin()
    local_rows = rows[list(ranks.share(ROWS))]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        made = model(local_rows)
    (whole * made.float()).square().sum().div(ROWS).backward()
    if ranks.size > 1:
        assert dtypes == [dtype]  # the weights were gathered in this dtype
    named = {**dict(model.named_parameters()), "whole": whole}
    ranks.sum_gradients(named.values())
    return {
        name: full(parameter.grad).clone()
        for name, parameter in named.items()
        if parameter.grad is not None
    }


def compare(
    rank: int,
    listener: socket.socket,
    expected: dict[str, torch.Tensor],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Compare gradients in one of the two processes."""
    address = listener.getsockname()
    ranks = Ranks.form(rank, SIZE, address, torch.device("cpu"), listener if rank == 0 else None)
    actual = gradients(ranks, dtype)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert actual[name].dtype == torch.float32
        assert (actual[name] - gradient).norm() <= tolerance * gradient.norm(), name
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_two_ranks_have_the_same_gradients_as_one(dtype: torch.dtype, tolerance: float) -> None:
    expected = gradients(Ranks(), dtype)
    assert len(expected) == 5
    assert all(gradient.abs().max() > 1e-3 for gradient in expected.values())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        spawn(compare, (listener, expected, dtype, tolerance), nprocs=SIZE)
