"""The ranks of one run: torch's process group, what they exchange, and sharded weights."""

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

# How long a rank waits for the others; an evaluation of one rank's share is much shorter.
TIMEOUT = datetime.timedelta(hours=2)


class Ranks:
    """This process as one of `size` ranks; alone, every exchange returns its input.

    All ranks must make the same calls in the same order.
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
        """Join torch's process group of `size` ranks at `address`: NCCL on GPUs, gloo on CPUs.

        `meeting` is the first rank's listening socket: torch's own would listen on every device.
        """
        # Also read by vLLM in this process.
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
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this rank's indices of `count` items: every `size`-th.

        Neighbours, which are often of similar length, go to different ranks.
        """
        return range(self.rank, count, self.size)

    def once(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 once all ranks have called this.

        Every rank returns its result or raises its error.
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
        """Return every rank's object, in the order of the ranks."""
        if self.size == 1:
            return [own]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, own)
        return everyone

    def interleave(self, own: list[T], count: int) -> list[T]:
        """Return `count` items in order on every rank, from each rank's `share` of them."""
        parts = self.all_objects(own)
        return [parts[i % self.size][i // self.size] for i in range(count)]

    def sum_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a tensor's sum over ranks; where each fills its own rows, everyone's rows."""
        if self.size > 1:
            dist.all_reduce(rows)
        return rows

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks; losses are divided by global totals."""
        parameters = list(parameters)
        if self.size == 1:
            return
        for sharded in [p for p in parameters if isinstance(p, DTensor)]:
            if sharded.grad is not None:  # FSDP has averaged, and gloo supports no other factor
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
        """Return each statistic's sum over ranks, or its maximum for names in `maxima`."""
        everyone = self.all_objects(dict(stats))
        largest = set(maxima)
        names = dict.fromkeys(name for rank in everyone for name in rank)
        return {
            name: (max if name in largest else sum)(r[name] for r in everyone if name in r)
            for name in names
        }

    def shard(self, model: Any, computes_in: torch.dtype) -> None:
        """Shard a transformers model's weights over the ranks by layer (FSDP2, arXiv 2304.11277).

        They are gathered in the dtype `computes_in`, also where they are trained in float32.
        """
        if self.size == 1:
            return
        self._mesh = self._mesh or init_device_mesh(self._device.type, (self.size,))
        # Activations between layers keep their dtype, as in one process.
        policy = MixedPrecisionPolicy(
            param_dtype=computes_in,
            reduce_dtype=next(model.parameters()).dtype,
            cast_forward_inputs=False,
        )
        layers = set(model._no_split_modules or ())
        for module in [m for m in model.modules() if type(m).__name__ in layers]:
            fully_shard(module, mesh=self._mesh, mp_policy=policy)
        # A tied embedding and head stay in the root's group.
        fully_shard(model, mesh=self._mesh, mp_policy=policy)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor; a sharded one is gathered, so every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(whole: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor on another's device, sharded as that one is."""
    if isinstance(other, DTensor):
        return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements)
    return whole.to(other.device)
