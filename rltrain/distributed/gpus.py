"""The GPUs of a machine or a cluster, and their memory. Imports no torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from rltrain.distributed import placement

MIB, GIB = 2**20, 2**30
SECONDS = 20


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs to plan for: the count on each machine, and the smallest's bytes (None: unknown)."""

    per_machine: tuple[int, ...]
    memory: int | None

    @property
    def count(self) -> int:
        """Number of GPUs of all machines."""
        return sum(self.per_machine)

    def __str__(self) -> str:
        return (
            f"{self.count}"
            if self.memory is None
            else f"{self.count} x {self.memory / GIB:.1f} GiB"
        )


def local_gpus() -> Gpus:
    """Return the GPUs that this process may use, with their memory by nvidia-smi."""
    count = placement.visible_gpus()
    sizes = visible_memory() if count else []
    return Gpus((count,), min(sizes) if sizes else None)


def visible_memory() -> list[int]:
    """Return the bytes of each GPU that this process may use.

    Empty where nvidia-smi does not tell, as for parts of a GPU (MIG).
    """
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, check=True, timeout=SECONDS
        ).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
        known = [(index, uuid, int(size) * MIB) for index, uuid, size in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in (allowed or "").split(",") if name.strip()]
    if allowed is None:
        return [size for _, _, size in known]
    return [
        size
        for index, uuid, size in known
        if any(n == index or (n != "-1" and uuid.startswith(n)) for n in names)
    ]
