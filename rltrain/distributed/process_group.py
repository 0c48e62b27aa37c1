"""The processes that train one run together: who this one is, and what they tell each other."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

# A rank that waits this long for the others gives up; an evaluation of one rank's share is well
# below.
TIMEOUT = datetime.timedelta(hours=2)


class Ranks:
    """One process of `size`; alone, every exchange is free. All ranks must make the same calls in
    the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self._device = device or torch.device("cpu")
        self._mesh: DeviceMesh | None = None

    @classmethod
    def form(
        cls,
        rank: int,
        size: int,
        address: tuple[str, int],
        device: torch.device,
        meeting: socket.socket | None,
    ) -> Ranks:
        """Join torch's process group of `size` ranks, which meets at `address`: NCCL on GPUs, gloo
        on CPUs.

        The first rank gives the socket that listens there: torch's own would listen on every
        device.
        """
        # vLLM inside this process reads them as well.
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address[0],
            "MASTER_PORT": str(address[1]),
        }
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = TCPStore(
            *address,
            size,
            is_master=rank == 0,
            timeout=TIMEOUT,
            master_listen_fd=None if meeting is None else meeting.detach(),
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        return cls(rank, size, device)

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things: every `size`-th, so that neighbours of like length
        are spread.
        """
        return range(self.rank, count, self.size)

    def once(self, action: Callable[[], T]) -> T:
        """The first rank acts when all have come here; every rank gets its result, or fails as it
        failed.
        """
        if self.size == 1:
            return action()
        dist.barrier()
        done: list[Any] = [None, None]
        if self.first:
            try:
                done[0] = action()
            except Exception as error:
                done[1] = error
        dist.broadcast_object_list(done, src=0)
        if done[1] is not None:
            raise done[1]
        result: T = done[0]
        return result

    def all_objects(self, own: T) -> list[T]:
        """Every rank's object, in the order of the ranks."""
        if self.size == 1:
            return [own]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, own)
        return everyone

    def interleave(self, own: list[T], count: int) -> list[T]:
        """`count` things of which each rank made its `share`, in order, on every rank."""
        parts = self.all_objects(own)
        return [parts[i % self.size][i // self.size] for i in range(count)]

    def sum_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor; where each fills its own rows and zeros elsewhere,
        everyone's rows.
        """
        if self.size > 1:
            dist.all_reduce(rows)
        return rows

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Make every gradient the sum of all ranks'; losses are divided by global totals, so none
        is averaged.
        """
        parameters = list(parameters)
        if self.size == 1:
            return
        for sharded in [p for p in parameters if isinstance(p, DTensor)]:
            if sharded.grad is not None:  # FSDP has taken the mean, and gloo knows no other factor
                sharded.grad.mul_(self.size)
        plain = [p for p in parameters if not isinstance(p, DTensor)]
        if plain:
            flat = torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in plain]
            )
            dist.all_reduce(flat)
            for parameter, gradient in zip(
                plain, flat.split([p.numel() for p in plain]), strict=True
            ):
                parameter.grad = gradient.view_as(parameter)

    def add_up(self, stats: Mapping[str, float], maxima: Iterable[str] = ()) -> dict[str, float]:
        """The sum of each statistic over the ranks; the largest for those named in `maxima`."""
        everyone = self.all_objects(dict(stats))
        largest = set(maxima)
        names = dict.fromkeys(name for one in everyone for name in one)
        return {
            n: (max if n in largest else sum)(one[n] for one in everyone if n in one) for n in names
        }

    def shard(self, model: Any, computes_in: torch.dtype) -> None:
        """Split a transformers model's weights over the ranks, layer by layer (FSDP2, arXiv
        2304.11277).

        They travel in the dtype they compute in: bfloat16, where they are float32 to be trained.
        """
        if self.size == 1:
            return
        self._mesh = self._mesh or init_device_mesh(self._device.type, (self.size,))
        # What goes from layer to layer stays as it is in one process.
        policy = MixedPrecisionPolicy(
            param_dtype=computes_in,
            reduce_dtype=next(model.parameters()).dtype,
            cast_forward_inputs=False,
        )
        layers = set(model._no_split_modules or ())
        for module in [m for m in model.modules() if type(m).__name__ in layers]:
            fully_shard(module, mesh=self._mesh, mp_policy=policy)
        # Tied embedding and head stay together in the root's group.
        fully_shard(model, mesh=self._mesh, mp_policy=policy)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole; one that FSDP sharded is gathered, so every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(whole: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """A whole tensor on another's device, sharded as that one is."""
    if isinstance(place, DTensor):
        return distribute_tensor(whole.to(place.device), place.device_mesh, place.placements)
    return whole.to(place.device)
